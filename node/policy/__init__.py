"""The model that a node trains: loaded by `load.py`; the built-in one is in `builtin/`."""
