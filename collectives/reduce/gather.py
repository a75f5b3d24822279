"""All-gather and broadcast: the same bytes at every member, nothing computed.

A broadcast is cut among the members: the root sends each its part, and each passes its part on to
the others. So the root sends its tensor about twice, however many members there are, and not once
to each; with two members, or few bytes, it sends it whole.
"""

from collections.abc import Sequence

import torch

from collectives.mesh.port import Port
from collectives.reduce.kernels import CHUNK_BYTES, Scratch, chunks, cut
from collectives.reduce.tensors import memory
from protocol.identity import NodeId

# Below this a second hop costs more than the root's sending to all: some 1 ms on a LAN at 100 Mbit/s.
WHOLE_BYTES = 64 << 10


def all_gather(port: Port, order: Sequence[NodeId], values: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return everybody's flat values, one after the other in the members' order: n times the size.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
    """
    count = values.numel()
    step = max(1, CHUNK_BYTES // values.itemsize)
    spans = list(chunks((0, count), step))
    result = scratch.take(count * len(order), values.dtype)
    own = order.index(port.own)
    others = [(own + i) % len(order) for i in range(1, len(order))]
    tickets = [
        port.expect(order[i], k, memory(result[i * count + first : i * count + end]))
        for k, (first, end) in enumerate(spans)
        for i in others
    ]
    for k, (first, end) in enumerate(spans):
        for i in others:
            port.send(order[i], k, memory(values[first:end]))
    result[own * count : (own + 1) * count] = values
    for ticket in tickets:
        port.wait(ticket)
    port.flush()
    return result


def broadcast(
    port: Port, order: Sequence[NodeId], values: torch.Tensor, root: NodeId, scratch: Scratch
) -> torch.Tensor:
    """Return the root's flat values; the others' give only size and type.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
    """
    others = [member for member in order if member != root]
    whole = len(others) < 2 or values.nbytes <= WHOLE_BYTES
    step = max(1, CHUNK_BYTES // values.itemsize)
    # Part i is the one that others[i] passes on.
    parts = [(0, values.numel())] if whole else cut(values.numel(), len(others))
    spans = [(i, span) for i, part in enumerate(parts) for span in chunks(part, step)]
    if port.own == root:
        result = scratch.take(values.numel(), values.dtype)
        for k, (i, (first, end)) in _by_turns(spans):
            for member in others if whole else [others[i]]:
                port.send(member, k, memory(values[first:end]))
        result.copy_(values)
        port.flush()
        return result
    return _receive(port, root, others, spans, scratch.take(values.numel(), values.dtype), whole)


def _receive(
    port: Port,
    root: NodeId,
    others: list[NodeId],
    spans: list[tuple[int, tuple[int, int]]],
    result: torch.Tensor,
    whole: bool,
) -> torch.Tensor:
    own = others.index(port.own)
    places = {k: memory(result[first:end]) for k, (_, (first, end)) in enumerate(spans)}
    tickets = {k: port.expect(root if whole or i == own else others[i], k, places[k]) for k, (i, _) in enumerate(spans)}
    if not whole:
        for k, (i, _) in enumerate(spans):
            if i == own:
                port.wait(tickets.pop(k))
                for member in others:
                    if member != port.own:
                        port.send(member, k, places[k])
    for ticket in tickets.values():
        port.wait(ticket)
    port.flush()
    return result


def _by_turns(
    spans: list[tuple[int, tuple[int, int]]],
) -> list[tuple[int, tuple[int, tuple[int, int]]]]:
    """Return numbered spans so that each part's first comes before any part's second."""
    seen: dict[int, int] = {}
    ranked = []
    for k, item in enumerate(spans):
        ranked.append((seen.get(item[0], 0), k, item))
        seen[item[0]] = seen.get(item[0], 0) + 1
    return [(k, item) for _, k, item in sorted(ranked)]
