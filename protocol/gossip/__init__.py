"""Getting items around: what is announced, asked for, held and passed on.

exchange       the machine and its rules             wants          what to ask for, of whom, and when
ledger         a row for each peer and item          chunks         large items, of which some chunks are there
store          what is held for others               subscriptions  which items are wanted, and how many

A new message of a peer about items is a class in `protocol.wire.messages` and an arm of `Gossip._heard`; what it
changes is a row of the tables in `ledger`.
"""
