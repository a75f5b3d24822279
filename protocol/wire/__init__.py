"""Messages as bytes.

encoding     MessagePack under limits              envelope     the one form of a message: its size, signature, digest
messages     the bodies of all messages            compression  how an item's content is packed, and how far it unpacks
version      how two major versions part

To add a message: give it the next number in `envelope.Kind`, a class with that `kind` in `messages`, an arm where it is
handled (`Membership._message` for what is about peers; `GOSSIP` in `core` and `Gossip._heard` for what is about
items), and a line in docs/protocol.md. Tests and fuzzing go through the declared classes.
"""
