"""torch's own distributed tests, on a backend: `python -m tests.torch_distributed BACKEND FOLDER WORLD TEST...`.

torch starts processes for each test; this starts them once, and prints `TEST ok|skipped|failed: REASON` for each. The
tests look at the environment's BACKEND for what to leave out: they are told "gloo", whatever carries them.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
import unittest
import warnings
from datetime import timedelta
from pathlib import Path

TIMEOUT_S = 20


def run_one(rank, world, backend, folder, names, results):
    """Be one rank, for all tests; each has a process group of its own."""
    warnings.simplefilter("ignore")
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(world), TEMP_DIR=str(folder), MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed import distributed_test

    import collectives.torch_backend  # noqa: F401

    torch.set_num_threads(1)
    cases = type("Cases", (distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase), {})
    for number, name in enumerate(names):
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/{number}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        case = cases(name)
        case.rank, case.file_name = rank, f"{folder}/{number}"
        outcome = "ok"
        try:
            dist.barrier()
            getattr(case, name)()  # a rank is set: so it runs here, and starts nothing
        except unittest.SkipTest as skipped:
            outcome = f"skipped: {skipped}"
        except SystemExit as left:
            outcome = f"skipped: exit status {left.code}"
        except BaseException as error:  # noqa: BLE001  # it is the result
            outcome = f"failed: {type(error).__name__}: {error} {traceback.format_exc()[-700:]!r}"
        results.put((name, rank, outcome))
        dist.destroy_process_group()


def main(backend, folder, world, *names):
    """Run the tests and print what came of each."""
    (Path(folder) / "barrier").mkdir(exist_ok=True)
    (Path(folder) / "test_dir").mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=run_one, args=(rank, int(world), backend, folder, names, results))
        for rank in range(int(world))
    ]
    for rank in ranks:
        rank.start()
    for name in names:
        told = [results.get() for _ in ranks]
        worst = next((one for _, _, one in told if one.startswith("failed")), told[0][2])
        print(name if all(one == name for one, _, _ in told) else told, worst, flush=True)
    for rank in ranks:
        rank.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if sys.argv[2] != "-" else tempfile.mkdtemp(), *sys.argv[3:])
