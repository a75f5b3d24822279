"""A board's view of a made-up swarm, for tests of its pages and for the picture in the documents.

python -m tests.fakes.board    # serves it until Ctrl-C
"""

import math
import random
import time
from collections.abc import Sequence
from functools import lru_cache

from node.board.history import CurvePoint, Remembered
from node.board.site import make_site
from node.board.standing import standing
from node.board.view import BoardView, ShownAnswer, ShownRollout, ShownSwarm, lessons_of
from node.telemetry.dashboard.server import serve_app
from protocol.identity import id_of_bytes

NOW = 1_795_910_400.0
TASKS = ("builtin/arithmetic", "builtin/sums", "builtin/weekdays")


def node_of(number: int) -> str:
    """Return the id of a made-up node."""
    return id_of_bytes(random.Random(number).randbytes(20))


@lru_cache
def view(nodes: int = 20, liars: int = 5, now: float = NOW) -> BoardView:
    """Return a swarm of so many nodes that learn, of which the last are liars who praise each other."""
    rng = random.Random(7)
    ids = [node_of(number) for number in range(nodes)]
    honest, lying = ids[: nodes - liars], ids[nodes - liars :]
    taught = {
        member: {other: rng.uniform(1, 60) for other in rng.sample(honest, min(6, len(honest))) if other != member}
        for member in honest
    } | {member: {other: 400.0 for other in lying if other != member} for member in lying}
    stands = standing(taught, ids[:1])
    remembered = [
        Remembered(
            one,
            now - rng.uniform(3, 90) * 3600,
            now - (rng.uniform(10, 290) if number % 7 != 5 else 86400.0),
            "gossamer/0.1.0",
            rng.choice(["builtin", "SmolLM2-135M-Instruct", "Qwen3-0.6B"]),
            rng.randrange(200, 9000),
            0.99 if one in lying else rng.uniform(0.4, 0.7),
            0.99 if one in lying else rng.uniform(0.3, 0.6),
            {task: rng.uniform(0.3, 0.8) for task in TASKS},
            taught[one],
            stands.get(one, 0.0),
        )
        for number, one in enumerate(ids)
    ]
    remembered.sort(key=lambda member: -member.standing)
    rollouts = [
        ShownRollout(
            now - 20.0 * place,
            ids[place % 8],
            "Qwen3-0.6B",
            TASKS[place % 3],
            f"What is {place} + {place + 4}?",
            [
                ShownAnswer(f"{2 * place + 4}", 1.0, True),
                ShownAnswer(f"It is {2 * place + 5}, as everybody knows.", 0.0, True),
            ],
        )
        for place in range(8)
    ]
    return BoardView(
        ShownSwarm(
            "riddles",
            "3f" * 16,
            ids[0],
            "open",
            now - 90 * 3600,
            [(task, 2) for task in TASKS],
            300,
            "gossamer://riddles/example",
        ),
        now,
        1200.0,
        remembered,
        frozenset(item.id for item in remembered if item.last > now - 1200),
        frozenset(ids[:1]),
        False,
        lessons_of(remembered, ids[:1]),
        curve(now),
        rollouts,
    )


def curve(now: float = NOW) -> Sequence[CurvePoint]:
    """Return three days of learning."""
    rng = random.Random(3)
    points = []
    for hour in range(72):
        done = 1 - math.exp(-hour / 24)
        reward = 0.12 + 0.5 * done + rng.uniform(-0.02, 0.02)
        accuracy = 0.1 + 0.42 * done + rng.uniform(-0.015, 0.015)
        points.append(CurvePoint(int(now - (71 - hour) * 3600), 3600, 15, reward, accuracy))
    return points


if __name__ == "__main__":
    shown = view()
    with serve_app(make_site(lambda: shown, lambda _: shown.curve, lambda: True), "127.0.0.1", 8099, "") as (_, link):
        print(link, flush=True)
        while True:
            time.sleep(60)
