"""Messages as bytes.

encoding     MessagePack under limits              envelope     the one form of a message: its size, signature, digest
messages     the bodies of all messages            compression  how an item's content is packed, and how far it unpacks
version      how two major versions part

To add a message: give it the next number in `envelope.Kind`, a class with that `kind` in `messages`, and a line in
docs/protocol.md. Messages about peers are handled in `Membership._message`. Those about items are named in `GOSSIP` of
`core` and handled in `Gossip._heard`. Tests and fuzzing go through the declared classes.

To add a field: append it to its body, read it by `unpack(..., optional=1)` with a default for peers that do not send it
(as `credentials.manifest` does), and raise `version.MINOR`. Older nodes skip it.
"""
