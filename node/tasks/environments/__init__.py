"""Tasks of several turns.

episodes      a turn, an episode, and peers' episodes played again
trl           rows and environments in TRL's form, with tools
tool_calls    the forms in which a policy calls a tool
"""
