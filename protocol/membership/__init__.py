"""Who is here: the links that a node keeps, the addresses that it knows, and who has failed.

membership     the machine and its rules                  failure_detector  which live peers still answer
links          the life of a link, and one link a pair    dissemination     how records travel
address_book   whom we could dial                         directory         records: our own, and the good ones
rumours        what is said about members' health         feelers           seeds and old acquaintances, tried for good
hellos         what a hello is worth                      reachability      whether we can be dialled, as others see us
refusals       who refused whom, and why                  dialing           whom we dial, and when
random_table   what the book is kept in                   revocation_exchange  how the revocation list travels
pairing        who is near whom for the time being

A new message about peers has an arm in `membership`; a part with state of its own has a file here.
"""
