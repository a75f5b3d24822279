"""What an answer earns, and where other people's code that says so runs.

verdicts      what an answer earns; other people's code scores in worker processes
time_quota   the seconds that scoring some peers' texts may take
caged         the worker that scores each text in a cage
fork_server   a process for each episode of other people's environments
"""
