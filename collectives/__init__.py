"""What a group of nodes computes together: all-reduce, shared state, DiLoCo.

The home of the interface; no operation is published yet. It will stand on
`protocol` and serve `node`, and imports nothing from `node`.
"""
