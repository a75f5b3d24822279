"""Members' agreement cores on a simulated network, put through crashes, pauses, loss and partitions.

    network      links in virtual time: in order unless told otherwise, cut, blocked one way or both
    schedule     a program at each member that calls operations, and what goes wrong and when, drawn from a seed
    trial        one schedule from the founding to the end, with what must hold throughout
    sweep        many of them, on several processes
    __main__     the command
    large_view   one view change of up to 256 members, each of which takes the processor time that it costs

`python -m collectives.simulator --schedules 2000 --seed 1 --members 4`
"""
