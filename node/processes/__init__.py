"""Processes and the operating system: knows nothing of nodes.

worker_process   code that must not run in the node itself, and how both sides speak
confinement      a process without network that changes no file
cage             a call in a process of its own, of which nothing is left
call_supervisor  what such a call takes, in all its processes
threads          calls on threads that the end of the process does not wait for; a wait for async functions
signals          what asks a process to stop
machine          processors, freed memory, what is defended on Linux alone
"""
