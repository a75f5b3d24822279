"""The project's own tasks, in the standard library only.

families      small families and natural arithmetic
guess         a game of several turns: higher or lower
"""
