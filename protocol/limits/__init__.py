"""Limits: what others may cost us.

limits         all bounds of a node, `Limits`, each with its reason
timing         how patient a node is, `Timing`
networks       prefixes, network groups, and from how far an address can be reached
quotas        what the nodes of one network may cost in processor time, and the frames that wait for it
rate_limits    token buckets
peer_scores    what each peer did: offences, refusals, and how long these last
send_queues    what waits to be sent: bounded in bytes, shared fairly, under the upload limit
connections    which TCP connections are cut: what libzmq does not defend by itself

What all nodes of one network may cost us at most:

    processor time           0.1 core, and strangers there as much again      quotas
    handshakes               32 a second: 0.02 core                           connections
    frames that wait         1 MiB, and strangers there as much again         quotas
    incomplete messages      6 MiB, four times as much in small parts         connections
    connections              128 of 50 kB: 6 MiB                              connections
    unfinished large items   a quarter of 256 MiB                             gossip.wants
    our messages to it       4 links of 256 KiB: 1 MiB                        send_queues
    the ledger of its links  4 x 4,096 rows of 200 bytes: 3 MiB               gossip.ledger
    together                 0.22 core, and some 100 MiB

To add an offence, give it a price in `peer_scores.PENALTIES`, or say in tests/unit/test_protocol_limits.py why it has
none. An item that a node rejects (`Core._judged`) costs `REJECT_PENALTY`; why it rejects a group stands in
`node.rollouts.screening`.
"""
