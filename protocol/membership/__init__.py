"""Membership: the links that a node keeps, the addresses that it knows, and the nodes that have failed.

membership           the machine and its rules
links                the life of a link, and one link a pair
address_book         whom we could dial
dialing              whom we dial, and when
feelers              seeds and old acquaintances, tried for good
pairing              who is near whom for the time being
failure_detector     which live peers still answer
dissemination        how records travel
directory            records: our own, and the good ones
reachability         whether we can be dialled, as others see us
revocation_exchange  how the revocation list travels

A new message about peers has an arm in `membership`; a part with state of its own has a file here.
"""
