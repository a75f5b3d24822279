"""Benchmarks: `python -m benchmarks.round --help`, and so on.

Each module's `run` yields rows, one JSON object a line, last the ratios.
"""
