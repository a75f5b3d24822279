"""Groups of communicators in one process: each member acts on a thread of its own."""

import threading
from contextlib import contextmanager

from collectives import Communicator
from collectives.types import LAN
from tests.waiting import wait_until


def together(*calls, timeout=60):
    """Run calls at once, each on a thread; return their results, exceptions included."""
    results = [None] * len(calls)

    def run(index):
        try:
            results[index] = calls[index]()
        except Exception as error:  # noqa: BLE001  # the test looks at it
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a call did not return"
    return results


def join(comms, **options):
    """Connect one more member and let it in; return it."""
    found, options = [], {"timing": LAN, **options}
    thread = threading.Thread(
        target=lambda: found.append(Communicator.connect("test", seeds=[comms[0].address], **options)), daemon=True
    )
    thread.start()
    # A first member that is still alone lets it in by itself.
    wait_until(lambda: found or all(comm.pending() for comm in comms), 15, "the newcomer to be seen")
    if not found and comms[0].epoch > 1:
        assert together(*(comm.admit for comm in comms)) == [None] * len(comms)
    thread.join(20)
    assert found, "the newcomer was not let in"
    wait_until(lambda: {comm.world_size for comm in comms} == {len(comms) + 1}, 10, "the view to hold everywhere")
    return found[0]


@contextmanager
def group(size, **options):
    """A group of `size` members; those that are still there leave at the end."""
    comms = [Communicator.connect("test", **{"timing": LAN, **options})]
    try:
        while len(comms) < size:
            comms.append(join(comms, **options))
        yield comms
    finally:
        for comm in comms:
            comm.leave()
