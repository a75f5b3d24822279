"""Reward functions in TRL's form.

rows          questions from rows, and what their answers earn
functions     calls the functions as TRL does, in a process of their own
judge         another model as a reward function
"""
