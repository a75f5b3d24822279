"""`torch.distributed` over a group that outlives its members: the process-group backend "gossamer".

    import collectives.torch_backend
    torch.distributed.init_process_group("gossamer")     # a fixed world, as `torchrun` starts it

    comm.run(step, state)                                # a world that changes, where `step` begins with
    if torch_backend.enter(comm): ...                    # True: the ranks are others, so wrap the model anew

**An operation has no agreement of its own.** It uses a port of the members' data streams, under a name that all ranks
know: the view, the turn (their last rendezvous), the group, and how many operations the group had before. So it costs
its bytes and no further message, and on an error its buffer is undefined, as gloo's is. The verdict comes once a step,
by the end of a step of `Communicator.run`.

**Errors.** When a member is lost, or calls something else (a hash of the arguments is in each payload's slot), or
the time is up, an operation raises `BackendError`, which names the rank. The group is *broken* from then on: its other
operations raise the same, here and, because this is told to them, at its other ranks. `enter` begins anew. Arguments
that cannot be used raise `BadArgument` at their caller, and break nothing: the call was not made.

**Order.** Collectives of one group run one after the other on a thread of the group, or on the caller's own if it
waits for the result and nothing is under way. A callback of a future runs on the group's thread, and the collectives
that it calls run there and then, before those that are queued: so it may wait for them, as DDP's PowerSGD hook does.
Sends and receives are begun where they are called. A receive from any source is begun by whoever waits for it, after
those with its tag that were called before.

**The end.** `destroy_process_group`, or else the end of the program, waits until the other ranks have what this one has
sent, each in its window for what is not yet asked for; at most the group's `timeout`. Then it leaves, and the others go
on. An operation that would need it later fails at once. A rank that ends by an exception waits for nobody: it owes what
it cannot give. A process that is forked from a rank, such as a loader of data, is none: it waits for nobody, and its
parent's group goes on.

**Who may be a rank.** Ranks put the ids of fresh keys into torch's store, and only whoever proves to have one of these
keys is let in. So what a stranger reads in the store is of no use to it. It can write there, too: until the ranks have
met it could put its own id in the place of another. With a secret, which the store never sees, that is of no use.

**CUDA tensors** are copied to the CPU and back. A work is over when its tensors are filled on the device, so `wait`
blocks the caller and leaves nothing to wait for on a stream.


    start   how a world of ranks comes about: by torch's store, or by `enter`
    group   torch's process group: its collectives
    work    torch's work: one of them under way
    ends    how a world ends: with its program, in order or not

An operation of `torch.distributed` is a method of `group.ProcessGroupGossamer` alone, which calls its `_run`.
"""

from collectives.torch_backend.group import BackendError
from collectives.torch_backend.start import LISTEN, SECRET, Options, enter, failures_are_called_off, register

__all__ = ["LISTEN", "SECRET", "BackendError", "Options", "enter", "failures_are_called_off"]

register()
