"""Getting items around: what is announced, asked for, held and passed on.

exchange       the machine and its rules             wants          what to ask for, of whom, and when
ledger         a row for each peer and item          chunks         large items, of which some chunks are there
store          what is held for others               subscriptions  which items are wanted, and how many
pace           how much may be under way over our line

To add a message about items: write its class in `protocol.wire.messages`, an arm of `Gossip.heard`, and what it
changes into the table `THEIRS` of `ledger`.
"""
