"""Messages as bytes.

encoding     MessagePack under limits              envelope     the one form of a message: its size, signature, digest
messages     the bodies of all messages            compression  how an item's content is packed, and how far it unpacks
version      how two major versions part

A new message is a number in `envelope.Kind`, a class in `messages` with that `kind`, and an arm where it is handled:
in `core`, `membership` or `gossip`. The codecs' tests iterate over the classes.
"""
