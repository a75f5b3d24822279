"""What peers say, as bytes: MessagePack under limits, signed envelopes, the bodies of all messages."""
