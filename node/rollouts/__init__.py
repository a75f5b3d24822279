"""Rollouts: from a round's groups to the swarm and back into what is trained on.

group           a question's completions with their rewards, and their wire form
sampling        what a round trains on: from groups to weighted completions, by a rule
rules/          the rules, one a file
screening       what a peer's group must pass
replay_buffer   peers' groups, on disk and bounded
lengths         how long an answer is here
usefulness      how useful each peer was, and a draw that follows it
"""
