"""How members reach each other: addresses, the handshake, sealed frames, and the ports that tensors take."""
