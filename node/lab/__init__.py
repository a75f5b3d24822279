"""The laboratory: one file names arms, bases, seeds and budgets; the results are a table, plots and one JSON.

    plan        the file: which runs there are, and what each is given
    runs        do what is missing, as many at once as the cores allow
    on_ray      the same as tasks of a Ray cluster
    lockstep    the runner "memory": all nodes of a swarm in one process, round by round
    ensemble    their generation, one batch for all of them
    churn       when nodes leave and come back
    averaging   weights of the runner "memory", averaged by a node's own code
    controls    rules that are no settings of a node
    candidates  those that may become the default rule
    attacks     what hostile nodes of a run publish
    trials      a file of attacks: which attack meets which defence
    damage      how often honest nodes do what an attack wanted, and what they lose
    results     what a run left, and an earlier JSON has
    statistics  means over seeds with their intervals
    figures     the figures of runs, and a line for each arm over its seeds
    worth       a swarm beside one node with its whole compute: accuracy, pooling efficiency
    tables      the table, the JSON, prices and the comparison of two
    plots       reward over rounds and over compute

Arms differ in a node's settings, and in delay, attack, churn, control, moments and parts (`plan`).
"""
