"""Getting items around: what is announced, asked for, held and passed on.

gossip      the machine and its rules                      want_list       what to ask for, of whom, and when
peer_state  what one live peer wants, knows and is owed    subscriptions   which items anybody wants, and how many
item_store  what is held for others                        announce_timer  when news is told
downloads   large items, a chunk at a time

What gossip is told and asks for is declared in `protocol.events` and has an arm in `gossip`; a part with state of its
own has a file here.
"""
