"""How members reach each other: addresses, the handshake, sealed frames, and the ports that tensors take.

    addresses      where members listen, and dialling without waiting; Unix sockets on one machine
    handshake      a signed key exchange, bytes in, bytes out: who may join, and who knows the group
    sealing        the records after it, encrypted or authenticated only
    limits         what those who are no members may cost: handshakes, links
    connection     one control connection: its handshake, then its frames, on a socket that never blocks
    forks          what a forked process does not keep: the sockets
    mesh           all of them: who is linked, who is dialled; one thread's
    framing        the header of a piece on a data stream
    stream         one data stream: a thread that reads, one that writes, and the queue that it sends from
    shared_memory  memory of one machine, which each member writes for itself and the others read
    data_plane     the streams to every member, and the operations that they carry pieces of
    port           what an operation's algorithm sees of all this
    socket_port    that, over streams: what came, what is expected, what is sent

To add a transport, give `mesh` and `stream` another kind of socket: nothing else knows what a socket is.
"""
