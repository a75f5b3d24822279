"""Limits: what others may cost us.

networks       prefixes, network groups, and from how far an address can be reached
budgets        what the nodes of one network may cost in processor time, and the frames that wait for it
rate_limits    token buckets
peer_scores    what each peer did: offences, refusals, and how long these last
send_queues    what waits to be sent: bounded in bytes, shared fairly, under the upload limit
connections    which TCP connections are cut: what libzmq does not defend by itself

To add an offence, give it a price in `peer_scores.PENALTIES`, or say in `peer_scores.FREE` why it has none. An item
that a node rejects (`Core._judged`) costs `REJECT_PENALTY`; why it rejects a group stands in `node.rollouts.screening`.
"""
