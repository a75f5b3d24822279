"""Membership: the links that a node keeps, the addresses that it knows, and the nodes that have failed.

membership        the machine and its rules, from a hello on
links             the life of a link, one link a pair, and who is near whom
address_book      whom we could dial
dialing           whom we dial, and when: feelers too
failure_detector  which live peers still answer
directory         records, our own and others', and how they and the revocation list travel
reachability      whether we can be dialled, as others see us

A new message about peers has an arm in `membership`; a part with state of its own has a file here.
"""
