"""One rank of a world over lines between machines: `python -m tests.torch_lines BACKEND`, as torchrun starts it.

It reduces for each line that it is sent on stdin, and says what came of it; it ends with stdin.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import collectives.torch_backend  # noqa: F401


def main(backend):
    """See above."""
    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=100))
    for _ in sys.stdin:
        x = torch.ones(1000)
        dist.all_reduce(x)
        print(x[0].item(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
