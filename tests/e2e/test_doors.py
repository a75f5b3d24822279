"""What a package's door says of how to add something is all that it takes: in a copy of the tree it is done, and works.

Each addition below changes only what its door names. A name that a door's paragraph has and no addition goes through
fails, too; so a door is changed together with what is tried here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("node", "collectives", "protocol", "tests", "website", "examples", "docs", "benchmarks")

NEWEST = '''"""The newest rule: peers' informative groups that came last, whole. Own groups are trained on whole."""

from collections.abc import Sequence

from node.rollouts.rule import Candidate, DrawRequest, Pick, Rule, picks_of_groups, whole_group


def draw_newest(candidates: Sequence[Candidate], request: DrawRequest) -> list[Pick]:
    """Return the picks of the newest groups."""
    informative = [one for one in candidates if one.informative]
    return picks_of_groups(sorted(informative, key=lambda one: -one.received)[: request.count], request)


RULE = Rule(own=whole_group, peers=draw_newest, group_weight=lambda completions: 1.0)
'''

ECHO = '''"""An engine that says a digit, by its seed alone."""

import random
from collections.abc import Sequence
from pathlib import Path

from node.config import EngineConfig
from node.engines import Generated, SamplingParams
from node.policy.load import Policy


def make(config: EngineConfig, policy: Policy, folder: Path) -> "EchoEngine":
    """Return the engine."""
    return EchoEngine(policy)


class EchoEngine:
    """Says 0 or 1."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return digits."""
        rng = random.Random(seed)
        return [[self._say(rng.choice("01")) for _ in range(n)] for _ in prompts]

    def _say(self, text: str) -> Generated:
        return Generated(tuple(self._policy.encode_completion(text, True)), text, True)

    def load(self, version: int) -> None:
        """There is nothing to take."""

    def rest(self) -> None:
        """There is nothing to leave."""

    def close(self) -> None:
        """There is nothing to give back."""
'''

PARITY = '''"""Is a number odd?"""

from collections.abc import Mapping
from dataclasses import dataclass

from node.errors import UserError
from node.tasks import Item, TaskKey, config_hash


@dataclass(frozen=True, slots=True)
class Parity:
    """Asks for 1 if the number is odd, and else for 0."""

    key = TaskKey("parity", 1, config_hash({}))

    def make(self, seed: int) -> Item:
        """Return the question."""
        return Item(f"{seed % 10_000}+0=", str(seed % 2))

    def verify(self, item: Item, text: str) -> float:
        """Pay the right digit."""
        return float(text.strip() == item.answer)


def load_parity(options: Mapping[str, object]) -> Parity:
    """Return the task."""
    if options:
        raise UserError("task 'parity' has no options")
    return Parity()
'''

RIDDLE = '''@value
class Riddle:
    """Asks for the length of a text, which a pong tells."""

    kind: ClassVar[Kind] = Kind.RIDDLE
    text: str

    def encode(self) -> bytes:
        """Return the body's bytes."""
        return pack([self.text])

    @classmethod
    def decode(cls, body: bytes) -> "Riddle":
        """Read a body."""
        (text,) = unpack(body, 1, error=MessageError, max_text=MAX_REASON_BYTES)
        _check(isinstance(text, str))
        return cls(text)


'''


class Step(NamedTuple):
    """A change of a file: `added` goes before `place`, or is a new file where there is no place.

    `named` is the name by which the door tells of it.
    """

    named: str
    path: str
    place: str
    added: str


class Door(NamedTuple):
    """A door: where it stands, how its paragraph begins, the steps, and names that are no step of this addition."""

    path: str
    begins: str
    steps: tuple[Step, ...]
    mentioned: frozenset[str]


RULES, ENGINES, TASKS = (f"node/{name}/__init__.py" for name in ("rollouts/rules", "engines", "tasks"))
CODECS, MEMBERSHIP, METRICS = "collectives/reduce/codecs.py", "protocol/membership/membership.py", "node/metrics.py"
BOUNDS, STEPS = "tests/unit/test_collectives_tensors.py", "tests/unit/test_collectives_reduce.py"
MESSAGES = "protocol/wire/messages.py"
LOAD_PARITY = """def _load_parity(name: str, options: Options) -> Sequence[Task]:
    from node.tasks.parity import load_parity

    return [load_parity(options)]


"""
TWICE = """def twice(rng: random.Random, difficulty: int) -> tuple[str, str]:
    number = rng.randrange(10**difficulty, 10 ** (difficulty + 1))
    return f"{number}:", f"{number}{number}"


"""
HELLO = '''"""`gossamer hello`."""


def hello() -> None:
    """Greet.

    \\b
    Example:
      gossamer hello
    """
    print("hello")
'''
ONES = """    Metric(
        "ones", "answers of one", "share", "own completions that say 1", MEAN, SUMMARY | REPORT | DASHBOARD, "ones"
    ),
"""
ANSWER = """            case Kind.RIDDLE if is_peer:
                return [Send(link, Pong(len(Riddle.decode(body).text)))]
"""

DOORS = {
    "rule": Door(
        RULES,
        "To add a rule:",
        (
            Step("RULE", "node/rollouts/rules/newest.py", "", NEWEST),
            Step("above", RULES, "    sapo    ", "    newest      the newest groups\n"),
            Step("RULES", RULES, "positive, rft, sapo", "newest, "),
            Step("RULES", RULES, '"sapo": sapo', '"newest": newest.RULE, '),
            Step("SamplingConfig.rule", "node/config.py", '"sapo", "positive", ', '"newest", '),
        ),
        frozenset(),
    ),
    "engine": Door(
        ENGINES,
        "To add an engine:",
        (
            Step("RolloutEngine", "node/engines/echo.py", "", ECHO),
            Step("above", ENGINES, "    server    ", "    echo            says 0 or 1\n"),
            Step("make_engine", ENGINES, "hf, server, vllm\n", "echo, "),
            Step("make_engine", ENGINES, '"hf": hf.', '"echo": echo.make, '),
            Step("EngineConfig.kind", "node/config.py", '"hf", "vllm", "server"]', '"echo", '),
        ),
        frozenset({"make", "missing", "node.policy.memory"}),  # its module has one; nothing is installed or held
    ),
    "task": Door(
        TASKS,
        "To add a kind of task:",
        (
            Step("load_...", "node/tasks/parity.py", "", PARITY),
            Step("above", TASKS, "    dataset    ", "    parity           is a number odd\n"),
            Step("KINDS", TASKS, "KINDS: Mapping", LOAD_PARITY),
            Step(
                "KINDS", TASKS, '        "file": T', '        "parity": TaskKind(_load_parity, lambda: ["parity"]),\n'
            ),
            Step("docs/tasks.md", "docs/tasks.md", "| anything else |", "| `parity` | is a number odd |\n"),
        ),
        frozenset({"Task", "is_file_task", "node/config.py", "node.tasks.choices"}),  # it has no files and no texts
    ),
    "family": Door(
        "node/tasks/builtin/families.py",
        "To add a family:",
        (
            Step(
                "above",
                "node/tasks/builtin/families.py",
                "    arithmetic  two",
                "    twice       a number twice    3:  33\n",
            ),
            Step("BY_NAME", "node/tasks/builtin/families.py", "FAMILIES: Mapping", TWICE),
            Step(
                "BY_NAME",
                "node/tasks/builtin/families.py",
                '"summands": partial',
                '"twice": partial(build, "builtin/twice", twice), ',
            ),
        ),
        frozenset({"FAMILIES", "builtin"}),  # it is none of the seven
    ),
    "verb": Door(
        "node/cli/__init__.py",
        "To add a verb:",
        (
            Step("Example:", "node/cli/hello.py", "", HELLO),
            Step("app", "node/cli/app.py", "    identity,\n", "    hello,\n"),
            Step("app.command", "node/cli/app.py", 'app.command("demo")', 'app.command("hello")(hello.hello)\n'),
        ),
        frozenset(),
    ),
    "codec": Door(
        "collectives/reduce/__init__.py",
        "To add a codec:",
        (
            Step("Codec", "collectives/types.py", '    INT8 = "int8"', '    INT8_TWIN = "int8-twin"\n'),
            Step("CODERS", CODECS, "    Codec.INT8:", "    Codec.INT8_TWIN: _int8,\n"),
            Step("codecs", CODECS, "    INT8      ", "    INT8_TWIN         as INT8\n"),
            Step("STEP", STEPS, "Codec.INT8: 1", "Codec.INT8_TWIN: 1 / 126, "),
            Step("bounds", BOUNDS, "    marked = ", "    codec = Codec.INT8 if codec is Codec.INT8_TWIN else codec\n"),
        ),
        frozenset({"weights.codec"}),  # takes it of itself
    ),
    "message": Door(
        "protocol/wire/__init__.py",
        "To add a message:",
        (
            Step("envelope.Kind", "protocol/wire/envelope.py", "    DIALLED_BACK = 22\n", "    RIDDLE = 23\n"),
            Step("messages", MESSAGES, "@value\nclass Goodbye:", RIDDLE),
            Step("Membership._message", MEMBERSHIP, "            case Kind.PONG if is_peer:\n", ANSWER),
            Step("Membership._message", MEMBERSHIP, "    Revocations,\n)", "    Riddle,\n"),
            Step("docs/protocol.md", "docs/protocol.md", "| 22 | ", "| 23 | RIDDLE | `[text]`: how long is it? |\n"),
        ),
        frozenset({"kind", "GOSSIP", "core", "Gossip._heard"}),  # it is not about items
    ),
    "metric": Door(
        METRICS,
        "To add a metric:",
        (
            Step("DECLARED", METRICS, "    # The round.\n", ONES),
            Step(
                "metrics_of_own",
                "node/telemetry/round_metrics.py",
                '        "generated": len(episodes),\n',
                '        "ones": statistics.fmean(episode.text == "1" for episode in episodes),\n',
            ),
        ),
        frozenset({"exported", "python -m website.grafana", "examples/grafana.json"}),  # `copy` does it
    ),
}

# What was added, at work; prints nothing where all is well.
TRIED = """
import json, sys
from pathlib import Path
import torch
from collectives.reduce.codecs import coder_for
from collectives.types import Codec
from node.cli.app import run
from node.config import TaskConfig, parse_config
from node.fleet.report import write_report
from node.telemetry.summary import summarise_node
from node.metrics import METRICS
from node.tasks import load_tasks, task_names
from node.telemetry.dashboard.feed import Feed, curves
from node.telemetry.metrics_file import read_metrics
from node.telemetry.status_server import family
from protocol.credentials.records import make_record
from protocol.events import Arrived, Link, SendFrame
from protocol.wire.envelope import Kind, read_control
from protocol.wire.messages import Hello, Pong, Riddle
from tests.fuzz.targets import NOW, PEER, SWARM, UNIX, new_core
from tests.protocol_frames import frame_of
from website.reference import PAGES

rows = read_metrics(Path("run/nodes/n0/metrics.jsonl"))
assert [row["round"] for row in rows] == [1, 2, 3]
assert all(0 < row["ones"] < 1 and "rewards/parity/mean" in row for row in rows), rows
assert any(row["groups_external"] for row in rows), "the rule draws"
assert any("ones" in curve["keys"] for curve in curves())
assert "ones" in Feed({"n0": Path("run/nodes/n0")}).poll()[0][1]["rows"][0]
assert "ones" in summarise_node(rows)
assert "answers of one, share" in write_report(Path("run")).read_text()
assert family(METRICS["ones"], 0.5).name == "gossamer_ones"
assert "gossamer_ones" in Path("examples/grafana.json").read_text() and "`ones`" in PAGES["reference/metrics.md"]()

assert {"parity", "builtin/twice"} <= set(task_names())
(task,) = load_tasks([TaskConfig(name="builtin/twice")]).tasks
assert task.verify(task.make(5), task.make(5).answer) == 1.0
assert run(["hello"], debug=False) == 0 and "## gossamer hello" in PAGES["reference/commands.md"]()

assert parse_config({"weights": {"codec": "int8-twin"}}).weights.codec == "int8-twin"
values, coder = torch.arange(300.0), coder_for(Codec.INT8_TWIN, torch.float32)
coder.decode(coder.encode(values), decoded := torch.empty(300))
assert float((values - decoded).abs().max()) <= 299 / 254 + 1e-3

core, link = new_core(), Link(PEER.curve_key, dialled=False)
record = make_record(PEER, SWARM, (), 1 << 16, "", int((UNIX + 3600) * 1000))
said = [(Kind.HELLO, Hello(record.encoded).encode()), (Kind.RIDDLE, Riddle("four").encode())]
for sequence, (kind, body) in enumerate(said, 1):
    done = core.handle(Arrived(link, frame_of(PEER, SWARM, kind, sequence, int(UNIX * 1000), body)), NOW)
answers = [read_control(one.frame) for one in done if isinstance(one, SendFrame)]
assert [(one.kind, Pong.decode(one.body).token) for one in answers] == [(Kind.PONG, 4)]
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with an addition of each sort."""
    tree = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tree)
    for door in DOORS.values():
        for step in door.steps:
            path = tree / step.path
            text = path.read_text() if step.place else ""
            assert text.count(step.place) == 1, step
            path.write_text(text.replace(step.place, step.added + step.place))
    python(tree, "-m", "website.grafana")
    return tree


def python(tree: Path, *arguments: str) -> None:
    """Run Python in the copy, by its own code."""
    path = os.pathsep.join((str(tree), str(tree / "node" / "public")))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_door_names_each_step_and_nothing_else(door: Door) -> None:
    text = (ROOT / door.path).read_text()
    paragraph = text[text.index(door.begins) :].split("\n\n")[0].partition('"""')[0]
    names = set(re.findall(r"`([^`]+)`", paragraph)) | set(re.findall(r"\b[a-z]+/[\w/]+\.\w+", paragraph))
    names |= {"above"} if re.search(r"\babove\b", paragraph) else set()
    steps, paths = {step.named for step in door.steps}, {step.path for step in door.steps}
    assert steps <= names <= steps | paths | door.mentioned
    assert door.mentioned <= names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_added_by_the_doors_works(copy: Path) -> None:
    settings = {
        "sampling.rule": "newest",
        "engine.kind": "echo",
        "sampling.source": "self",
        "network.enabled": "false",
        "observe.enabled": "false",
        "threads": "1",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = ["node", "--state", "run/nodes/n0", "--task", "parity", "--rounds", "3", "--seed", "1", *words]
    python(copy, "-c", f"from node.cli import main; main({json.dumps(command)})")
    python(copy, "-c", TRIED)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_added_by_the_doors_is_gone_through_by_the_tests(copy: Path) -> None:
    names = ("fuzz_corpus", "node_metrics", "node_status_server", "node_dashboard", "website", "protocol_codecs")
    tests = [f"tests/unit/test_{name}.py" for name in (*names, "collectives_tensors")]
    chosen = "declared or corpus or kind or keep_their_bounds or metrics"
    python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen)
