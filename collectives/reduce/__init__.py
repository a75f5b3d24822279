"""How tensors are reduced: algorithms, kernels, codecs, and the choice among them.

    inline         few values, which go with the agreement
    direct         every member owns a slice, and all exchange with all
    shared         the direct exchange and what only moves, in shared memory of one machine and user
    gather         everybody's values, and one member's to all
    kernels        the arithmetic, and what the algorithms share: a reduction's description, cuts, scratch memory
    codecs         how values travel in fewer bytes, and the error feedback that makes good what that loses
    tensors        torch and NumPy, in and out

A new algorithm takes a `Port` and a `Reduction`, and `operations.AllReduce` must say when.

To add a codec: name it in `Codec` (collectives/types.py), write its coder in `codecs`, and put that into `CODERS` there
and into the table on top. `weights.codec` takes it then. The tests go through all of `Codec`: give its error to `STEP`
in tests/unit/test_collectives_reduce.py and to `bounds` in tests/unit/test_collectives_tensors.py.
"""
