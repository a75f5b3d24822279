"""How tensors are reduced: algorithms, kernels, codecs, and the choice among them."""
