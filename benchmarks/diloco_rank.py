"""A member of `benchmarks.diloco`: takes outer steps without inner ones between, and prints a JSON object for each.

    python -m benchmarks.diloco_rank '{"impl", "rank", "ranks", "address", "founder", "mib", "codec", "late"}'

    {"ready": unix time}                                   everything is imported
    {"at": unix time, "revision": of the group, "members": of the step, "sent": bytes, "hash": of the parameters}

Members of "gossamer" say this secretly as over the internet. Those of "gloo" all-reduce a vector of that size, in
the clear. It goes on until it is ended.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from collectives import Codec, Communicator, DiLoCo

GROUP = "outer steps"
STEP_S = 120.0
PORT = 7700


def steps(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Take outer steps without end; a row for each."""
    founder = f"tcp://{options['founder']}:{PORT}"
    seeds = [founder] if options["rank"] else []
    listen = f"tcp://{options['address']}:{PORT}"
    secret = os.environ["GOSSAMER_SECRET"]
    parameters = torch.zeros(int(options["mib"] * (1 << 18)))
    noise = torch.randn(len(parameters), generator=torch.Generator().manual_seed(options["rank"])).mul_(0.001)
    with Communicator.connect(GROUP, seeds, listen, secret=secret, timeout=STEP_S) as group:
        codec = Codec(options["codec"])
        diloco = DiLoCo(group, [parameters], inner_steps=1, codec=codec, timeout=STEP_S, patience=STEP_S)
        if options["late"]:
            yield row(diloco.join(), diloco)
        else:
            group.wait_for(options["ranks"], timeout=STEP_S)
        while True:
            parameters.add_(noise)
            done = diloco.step()
            yield row(done, diloco)


def row(done: Any, diloco: DiLoCo) -> dict[str, Any]:
    """Say what an outer step did."""
    digest = hashlib.sha256(diloco.outer.numpy().tobytes()).hexdigest()
    return {
        "at": time.time(),
        "revision": done.revision,
        "members": len(done.contributors),
        "sent": done.bytes_sent,
        "hash": digest,
    }


def sums(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Sum up a vector by gloo without end; a row for each."""
    store = f"tcp://{options['founder']}:{PORT}"
    rank, ranks = options["rank"], options["ranks"]
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    vector = torch.zeros(int(options["mib"] * (1 << 18)))
    revision = 0
    while True:
        torch.distributed.all_reduce(vector)
        revision += 1
        yield {"at": time.time(), "revision": revision, "members": ranks, "sent": 0, "hash": ""}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    print(json.dumps({"ready": time.time()}), flush=True)
    for each in sums(given) if given["impl"] == "gloo" else steps(given):
        print(json.dumps(each), flush=True)
