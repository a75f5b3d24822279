"""The bounds of a node on what others may cost it."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of a node, on memory, bandwidth or patience.

    The defaults exist to stop a broken or hostile node. They are far above what an honest one sends: 8 nodes that
    publish 16 groups of 10 kB a second each, all relayed over one link, are 128 messages and 1.3 MB a second.
    """

    # Live links. In a swarm that fits into so many, a node is linked with everybody. In a larger one it has at most
    # three quarters as many (12), dials until it has 9, and leaves the rest to callers. A random overlay of degree 8
    # stays whole when 30 % of its nodes die at once. Its diameter is about log(n)/log(7): 5 at 10,000.
    max_peers: int = 16
    # Beside those, nodes that nobody can dial and that dialled us: one costs two descriptors, some 50 kB in libzmq, and
    # what is announced to it. Where 5 % of the nodes can be dialled, each has 19 others to serve, in eight places each.
    max_callers: int = 256
    max_known_peers: int = 512  # records in the book: a full directory up to that size, a random sample beyond
    # Of one public network (a /24, a /48, a domain): links, and places in the book. In a node's own /24 or /64 each
    # address has so many links. Loopback and private networks are not bounded.
    max_prefix_peers: int = 4
    max_prefix_records: int = 32

    inbox_items: int = 4096  # received and not yet taken by the node
    inbox_bytes: int = 64 * MIB  # beyond them an item waits in the store
    # Items kept for peers that still lack them, and as much again of items that are being fetched. 16 nodes that
    # publish 5 MB each are 80 MB.
    held_bytes: int = 256 * MIB
    # 32 completions of 16 thousand tokens are some 2 MiB of text. This is eight times as much.
    max_item_bytes: int = 16 * MIB

    # The processor time that the nodes of one network may cost, in cores, and at once, in seconds. The traffic above
    # takes three quarters of it. What waits for it may take so much memory: some 5,000 small frames.
    network_cores: float = 0.1
    network_burst_s: float = 1.0
    waiting_bytes: int = MIB

    upload_bytes_per_second: float = 0.0  # 0: no limit

    # Inbound TCP connections: those of live links, and of strangers that ask, probe or leave. One costs two file
    # descriptors and about 50 kB in libzmq. A prefix may have a quarter of them: enough for 64 nodes on one machine, or
    # behind one address, each with a link and its replacement. Where a process may
    # have fewer descriptors than four times as many, both are less.
    max_connections: int = 512
    max_prefix_connections: int = 128
    # A CURVE handshake costs about half a millisecond of CPU: 32 a second are under 2 % of a core.
    # The burst lets those 64 nodes start at once and dial again a few times.
    prefix_handshakes_per_second: float = 32.0
    prefix_handshakes_burst: float = 512.0
    # Received and not yet read, over all connections: what 384 links bring of a full window (`window_bytes`) each.
    # The socket queues are bounded in messages only.
    max_backlog_bytes: int = 192 * MIB
    # Of one prefix in incomplete messages. In parts of 34 bytes these take four times as much memory.
    prefix_backlog_bytes: int = 6 * MIB

    max_item_age_s: float = 3600.0  # older items are of no use to an on-policy learner; a manifest has its own
    max_clock_ahead_s: float = 600.0  # tolerates clocks off by minutes

    # A subject whose score falls below this is refused for a while. With a half-life of 10 minutes, 20 points at once
    # or 1.4 points a minute get a node refused (see PENALTIES).
    graylist_score: float = -20.0
    score_half_life_s: float = 600.0
    # The first refusal, and the longest; each is twice as long as the one before.
    first_refusal_s: float = 120.0
    last_refusal_s: float = 24 * 3600.0
    max_remembered: int = 4096  # nodes, keys, links or networks in each table of scores, allowances and the like

    # The time and bytes of a connection before we answer it. An honest stranger sends a hello of 4 KiB, waits, and
    # repeats it a few times. It is slower on a slow line, or while it loads a model.
    hello_s: float = 10.0
    unanswered_bytes: int = 1 << 18
    # Bytes that came beside whole messages: the CURVE handshake (about 700), another implementation's heartbeats, and
    # the beginning of a small message. Each message that follows clears the count.
    slack_bytes: int = 16 << 10

    # Our own messages that wait for one link: announcements and records of minutes. A peer that takes none for so long
    # is gone. On all 272 live links that there may be by default, these are 68 MiB.
    control_bytes: int = 256 << 10

    upload_burst_s: float = 0.25  # of the upload limit: what a line's own buffers hold
    upload_debt_s: float = 1.0  # of the upload limit: the debt that our own messages may run up

    # Membership. All that strangers and peers fill is bounded by number; the oldest goes.
    max_dials: int = 8  # attempts in progress at a time
    max_parting: int = 256  # links that are closed once a goodbye has arrived; others are closed at once
    max_neighbours: int = 16  # in our own network; anybody there can invent some, and make us dial so many a minute
    max_near_links: int = 4  # that we dial in our own network: as many as with one public network
    max_lapsed: int = 64  # lapsed nodes that are called now and then: at one call an hour each, one call a minute
    max_referrals: int = 8  # records for a caller without room here: it hears of all others once it is in
    # Messages that answer one digest: half of the largest directory. A digest is small, and its answer is not.
    max_answers: int = 4
    # Connections that peers may make us try, to see whether they can be dialled.
    dial_backs_per_second: float = 0.2
    dial_backs_burst: float = 4.0
    max_dial_back_answers: int = 8  # the newest count, one of each network

    # Gossip.
    beside_bytes: int = 8 << 10  # the largest item of a topic `beside` the others that has the allowance of these
    max_seen: int = 1 << 17  # items that are remembered: at 32 a second, for the hour after which they are stale
    max_pending: int = 8192  # ids that wait to be announced to one peer
    max_given: int = 1 << 14  # chunks (2 GiB) of which we remember how often we gave them
    max_served: int = 2048  # items and chunks that one peer may wait for
    # Items held. One takes some 700 bytes beside its frame, so `held_bytes` does not bound the smallest items well. It
    # is below `max_seen`, so that what is held does not come twice.
    max_held: int = 1 << 15
    max_partials: int = 256  # large items begun, each with an outline of 4 KiB for 16 MiB
    max_rows: int = 1 << 20  # of the ledger, of all peers: some 200 MB
    max_peer_rows: int = 4096
    least_peer_rows: int = 256
    max_wants: int = 8192
    max_offers: int = 2048  # wanted items of one holder: four can fill the table, one cannot
    max_holders: int = 32  # remembered of one item
    max_looks: int = 256  # wants looked at in a draw: bounds the work while all holders are busy
    # On their way from one holder: 10 MB/s at a round trip of 50 ms. Windows that grew to twice that were no faster on
    # lines of 1 to 1,000 Mbit/s.
    window_bytes: int = 512 << 10
