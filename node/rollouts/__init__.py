"""Rollouts: from a round's groups to the swarm and back into what is trained on.

group           a question's completions with their rewards, and their wire form
rule            what a round trains on: from groups to weighted completions, by a rule
rules/          the rules, one a file
screening       what a peer's group must pass, and who is at fault if it does not
draw            which of peers' groups a round trains on: begin, prepare, fill, take
slow_texts      the seconds that a signer's texts may take
group_buffer   peers' groups, on disk and bounded
own_results     the results of this node's own groups: how long its answers are, and how good
"""
