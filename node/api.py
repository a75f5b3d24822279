"""The Python interface: `from gossamer import Node, Swarm`.

    from gossamer import Node

    def accuracy(completions, answer, **kwargs):
        return [float(text.strip() == right) for text, right in zip(completions, answer)]

    node = Node("builtin", rewards=[accuracy], data=[{"prompt": "1+1=", "answer": "2"}, ...], folder="n0")
    node.train(rounds=20, callbacks=[lambda row: print(row["round"], row["reward"])])
    node.metrics                     # a list of dicts, one a round: pandas.DataFrame(node.metrics)
    node.generate(["1+2=", "2+2="], n=4)
    node.evaluate(count=50)
    node.export("my-model")

A node is its folder, as on the command line: `gossamer node --state n0` goes on with it, and `Node(folder="n0")` does.
Functions of a notebook are not in the folder: give them again.

Settings are those of the command line, by table: `Node(sampling={"local": 4}, trainer={"learning_rate": 1e-5})`.

Reward functions are given as they are, or by name (`node.tasks.rewards.functions`). One that can be imported again,
from a file or a package, is paid in worker processes and shared with peers. One of a notebook, of the script itself or
inside another function is paid in this process, and its groups are not shared: no peer can have it.

`Swarm` runs nodes in processes of their own.
"""

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.config import NodeConfig, flatten, parse_config, put
from node.errors import UserError
from node.operations.config_text import to_toml
from node.operations.given import anchored_tasks, read_invite, task_config
from node.operations.settling import settle
from node.state_folder import check_begun, make_folder, of_a_node
from node.tasks.rewards.functions import HERE
from node.telemetry.metrics_file import MetricsTail, Row, read_metrics

if TYPE_CHECKING:
    from node.policy.load import Policy
    from node.tasks import Task
    from node.training.evaluation import Answers, Decided

__all__ = ["Node", "Swarm", "UserError"]

Reward = str | Callable[..., Any]
Rows = str | Path | Iterable[Mapping[str, Any]]
AfterRound = Callable[[Row], object]
ROWS_FILE, TEST_FILE = "rows.jsonl", "test.jsonl"  # in a node's folder, of rows that a program gave
POLL_S = 0.5


class Node:
    """One node, in this process.

    Args:
        model: "builtin", a folder, or a model id; without it, the folder's own or "builtin".
        tasks: by name, by file, or as the table of a configuration.
        rewards: functions in TRL's form, for the rows of `data`.
        data: rows for `rewards` or an `environment`: a file, OWNER/NAME on the hub, or dicts with a `prompt`.
        test: rows of `data`'s kind that training never asks; without them, one in eight of `data`.
        options: further options of that task, such as weights and range (`node.tasks.rewards.rows`).
        environment: a class in TRL's form, for the rows of `data` (`node.tasks.environments.trl`).
        folder: the node's; made when it trains.
        swarm: an invite to the swarm that it joins; without one, it meets the peers that `network` says, if any.
        allow_tasks: tasks of that swarm to take with all that its founder chose, as `gossamer join --allow-task` does.
        settings: tables of the configuration.

    Raises:
        UserError: something that is given is of no use.
    """

    def __init__(  # noqa: PLR0913  # each is a thing of its own
        self,
        model: str | None = None,
        tasks: Sequence[str | Mapping[str, Any]] = (),
        rewards: Sequence[Reward] = (),
        data: Rows | None = None,
        *,
        test: Rows | None = None,
        options: Mapping[str, Any] | None = None,
        environment: Reward | None = None,
        folder: str | Path = "node-state",
        swarm: str | None = None,
        allow_tasks: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.folder = of_a_node(Path(folder))
        self._swarm = swarm
        self._allow_tasks = allow_tasks
        self._functions: dict[str, Callable[..., Any]] = {}
        self._kept: dict[str, list[Mapping[str, Any]]] = {}  # rows to be written into the folder, by file
        tables = [task_config(task) if isinstance(task, str) else dict(task) for task in tasks]
        if (data is None) != (not rewards and environment is None):
            raise UserError("rewards and data go together, as environment and data do: give both, or tasks alone")
        if data is not None:
            tables.append(self._rows_table(rewards, environment, data, test, options or {}))
        if swarm is not None and self._functions:
            name = next(iter(self._functions)).removeprefix(f"{HERE}:")
            raise UserError(f"the function {name} is of this process alone: in a swarm, import it from a file")
        self._named = {"policy.model": model, "tasks": tables or None, **flatten(settings)}
        self._loaded: tuple[Path | None, Policy, NodeConfig] | None = None  # for `generate`, `evaluate` and scripts
        self._settled(None)

    def _name(self, function: Reward) -> str:
        """Return how the table of a task names a function or class; one of this process alone is kept here."""
        spec = function if isinstance(function, str) else spec_of(function)
        if spec is None:
            spec = f"{HERE}:{getattr(function, '__name__', type(function).__name__)}"
            if spec in self._functions:
                raise UserError(f"two functions are called {spec.removeprefix(f'{HERE}:')!r}: rename one")
            assert not isinstance(function, str)
            self._functions[spec] = function
        return spec

    def _rows_table(
        self,
        rewards: Sequence[Reward],
        environment: Reward | None,
        data: Rows,
        test: Rows | None,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        named: dict[str, Any] = {"functions": list(map(self._name, rewards))}
        if environment is not None:
            named["factory"] = self._name(environment)
        kind = "rewards" if environment is None else "environment"
        sources = {key: self._source(key, rows) for key, rows in (("path", data), ("test", test)) if rows is not None}
        return anchored_tasks({"name": f"{kind}/{_label(data)}", "options": {**named, **sources, **options}})

    def _source(self, key: str, rows: Rows) -> str:
        """Return where rows are; those that a program gave will be in a file of the folder."""
        if isinstance(rows, str | Path):
            return str(rows)
        path = (self.folder / (ROWS_FILE if key == "path" else TEST_FILE)).absolute()
        self._kept[str(path)] = list(rows)
        return str(path)

    def _settled(self, rounds: int | None) -> NodeConfig:
        named = self._named if rounds is None else {**self._named, "rounds": rounds}

        def look(given: NodeConfig) -> None:
            if self._swarm is None:
                check_begun(given, self.folder)

        return settle(None, None, named, folder=self.folder, look=look).config

    def train(self, rounds: int, callbacks: Sequence[Any] = ()) -> list[Row]:
        """Train for `rounds` rounds more, from the newest checkpoint; return their metrics.

        A signal, as of Ctrl-C, ends it after the round in progress, with a checkpoint.

        Args:
            rounds: at least 1.
            callbacks: called with the metrics of each round once it is done; one that returns True ends the training.
                Those of transformers (`TrainerCallback`) are told what it tells them.

        Raises:
            UserError: the configuration, the folder or the machine needs a person.
        """
        done = self.round
        self.train_to(done + rounds, callbacks)
        return [row for row in self.metrics if row["round"] > done]

    def train_to(
        self,
        last: int,
        callbacks: Sequence[Any] = (),
        evaluations: "Decided | None" = None,
    ) -> list[Row]:
        """Train until `last` rounds are done in all; return the metrics of those since the newest checkpoint.

        Args:
            last: at least 1.
            callbacks: as `train` has them.
            evaluations: when they are made and what is said of them; without it, the configuration decides.

        Raises:
            UserError: as `train` does.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UserError("a node trains in the main thread: signals end it there")
        import torch

        from node.operations.preflight import check_first
        from node.operations.presets import check_model
        from node.run import Given, run_node
        from node.telemetry.logs import logs_of_block
        from node.training.evaluation import NOTHING_DECIDED

        self._loaded = None  # its memory is for the training
        _, done = self.checkpoint
        config = self._settled(last)
        check_first(config, self.folder)
        check_model(config)
        make_folder(self.folder)
        self._keep_rows()
        if self._swarm is not None:
            from node.swarm import joining

            config = joining.join(read_invite(self._swarm), config, self.folder, self._allow_tasks)
        given = Given(self._given(config), _as_callbacks(callbacks, self.folder), evaluations or NOTHING_DECIDED)
        threads = torch.get_num_threads()
        try:
            with logs_of_block(self.folder):
                run_node(config, self.folder, given=given)
        finally:
            torch.set_num_threads(threads)
        return [row for row in self.metrics if row["round"] > done]

    def _keep_rows(self) -> None:
        """Write the rows that a program gave into the folder."""
        for path, rows in self._kept.items():
            Path(path).write_text("".join(f"{json.dumps(dict(row))}\n" for row in rows))

    def _given(self, config: NodeConfig) -> "dict[str, Task]":
        """Return the task with functions or a class of this process, if there is one."""
        from node.tasks.environments.trl import load_environment
        from node.tasks.rewards.rows import load_rewards

        for table in config.tasks:
            if {*table.options.get("functions", ()), table.options.get("factory")} & set(self._functions):
                load = load_environment if "factory" in table.options else load_rewards
                return {table.name: load(table.name, table.options, self._functions)}
        return {}

    @property
    def checkpoint(self) -> tuple[Path | None, int]:
        """The newest checkpoint, if there is one, and the rounds that it has been trained for."""
        if not (self.folder / "checkpoints").is_dir():
            return None, 0
        from node.training.checkpoint import latest_checkpoint

        newest = latest_checkpoint(self.folder / "checkpoints")
        return (None, 0) if newest is None else (newest.path, newest.round)

    @property
    def round(self) -> int:
        """How many rounds are done, as far as the metrics say."""
        return _rounds_done(self.folder)

    @property
    def metrics(self) -> list[Row]:
        """One dict a round, by the names of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    def generate(
        self,
        questions: Sequence[str],
        n: int = 1,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
    ) -> list[list[str]]:
        """Return `n` answers to each question, by the newest checkpoint.

        Args:
            questions: bare, without an instruction or examples.
            n: answers to each.
            temperature: 0 for the likeliest words; without it, the node's.
            max_tokens: of an answer; without it, the node's limit.
            seed: of what is drawn.
        """
        from node.engines import SamplingParams, in_process
        from node.tasks import Item

        policy, config = self._policy()
        sampling = SamplingParams.from_config(config.engine)
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        if max_tokens is not None:
            sampling = replace(sampling, max_completion_length=max_tokens)
        prompts = [policy.encode_prompt(Item(question, "")) for question in questions]
        groups = in_process(policy).generate(prompts, n, sampling, seed)
        return [[completion.text for completion in group] for group in groups]

    def evaluate(self, count: int = 100, completions: int = 0, seed: int | None = None) -> dict[str, Any]:
        """Score the policy on `count` held-out questions of each task, as `gossamer eval --json` does.

        Args:
            count: questions of each task, at most.
            completions: sampled for each question, for pass@k; 0: only the likeliest answer.
            seed: chooses the questions; without it, those that a node evaluates itself on.

        Returns:
            "greedy", and "sampled" if there are `completions`: each with scores by task, and of all.
        """
        from node.tasks.task_set import EVALUATION_SEED
        from node.training.evaluation import score

        kinds = {"greedy": self.answered(count, 0, seed)}
        if completions:
            kinds["sampled"] = self.answered(count, completions, seed)
        questions = EVALUATION_SEED if seed is None else seed
        return {kind: score(questions, answers).as_dict() for kind, answers in kinds.items()}

    def answered(self, count: int, completions: int = 0, seed: int | None = None) -> "Answers":
        """Return scored answers to `count` held-out questions of each task, `completions` to each, or the likeliest.

        The arguments are those of `evaluate`.
        """
        from node.engines import SamplingParams, in_process
        from node.swarm.swarm_folder import load_manifest, split_of
        from node.tasks import load_tasks
        from node.tasks.task_set import EVALUATION_SEED
        from node.training.evaluation import answer

        policy, config = self._policy()
        if self._kept:
            make_folder(self.folder)
            self._keep_rows()
        sampling = SamplingParams.from_config(config.engine)
        return answer(
            policy,
            in_process(policy),
            load_tasks(config.tasks, split_of(load_manifest(self.folder)), given=self._given(config)),
            count=count,
            seed=EVALUATION_SEED if seed is None else seed,
            sampling=sampling if completions else replace(sampling, temperature=0.0, top_p=1.0),
            completions=completions or 1,
            longest=config.engine.longest_prompt(policy.positions),
        )

    def export(self, folder: str | Path, dtype: str | None = None) -> Path:
        """Write the policy of the newest checkpoint as an ordinary model folder, which must not exist; return it.

        `dtype` is float32, bfloat16 or float16; without it, what it was trained as.
        """
        from node.operations.model_export import write_model

        write_model(str(self.folder), Path(folder), dtype)
        return Path(folder)

    @property
    def policy(self) -> "Policy":
        """The policy of the newest checkpoint, or the one that training would begin from; kept until it trains."""
        return self._policy()[0]

    def _policy(self) -> "tuple[Policy, NodeConfig]":
        from node.operations.trained import find_trained
        from node.policy.load import load_policy

        path, _ = self.checkpoint
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None  # before another one takes as much memory
            if not (self.folder / "checkpoints").is_dir():
                config, adapters = self._settled(None), None
            else:
                trained = find_trained(str(self.folder), None)
                config, adapters = trained.config, trained.adapters
            self._loaded = path, load_policy(config.policy, config.trainer.bf16, adapters), config
        return self._loaded[1:]


class Swarm:
    """Nodes on this machine, each in a process of its own: what `gossamer swarm` runs, in the run folder `out`.

    Args:
        nodes: how many.
        model, tasks, rewards, data, test, options, settings: as of a `Node`; functions are given by name, or can be
            imported from a file or a package.
        out: the run's folder; one that holds the same run goes on.

    Raises:
        UserError: something that is given is of no use.
    """

    def __init__(
        self,
        nodes: int = 4,
        model: str | None = None,
        tasks: Sequence[str | Mapping[str, Any]] = (),
        rewards: Sequence[Reward] = (),
        data: Rows | None = None,
        *,
        out: str | Path = "swarm-run",
        test: Rows | None = None,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.out = Path(out)
        self._count = nodes
        self._rows = self.out.with_name(f"{self.out.name}-rows")  # the run's own folder must be new
        self._like = Node(model, tasks, rewards, data, test=test, options=options, folder=self._rows, **settings)
        if self._like._functions:
            name = next(iter(self._like._functions)).removeprefix(f"{HERE}:")
            raise UserError(
                f"the function {name} is of this process alone: put it into a file, and import it from there"
            )

    def train(self, rounds: int, callbacks: Sequence[Callable[[str, Row], object]] = ()) -> "list[Node]":
        """Run the nodes to `rounds` rounds in all; return them, with their metrics.

        Args:
            rounds: of each node.
            callbacks: called with a node's name and the metrics of each of its rounds, soon after it.

        Raises:
            UserError: the run failed; the text is its last line.
        """
        like = self._like
        folders = [self.out / "nodes" / f"n{index}" for index in range(self._count)]
        told = {folder: _rounds_done(folder) for folder in folders}
        if like._kept:
            make_folder(self._rows)
        like._keep_rows()
        tree: dict[str, Any] = {}
        for key, value in like._named.items():
            if value is not None:
                put(tree, key, value)
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "swarm.toml"
            config.write_text(to_toml(parse_config(tree), only_what_is_set=True))
            words = ["swarm", config, "-n", self._count, "--rounds", rounds, "--out", self.out, "--no-table"]
            main = "import sys; from node.cli import main; sys.exit(main())"
            command = [sys.executable, "-c", main, *map(str, words)]
            path = os.pathsep.join(filter(None, sys.path))
            with (Path(folder) / "output").open("w+") as output:
                child = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
                )
                self._follow(child, told, callbacks)
                output.seek(0)
                lines = output.read().splitlines()
        if child.returncode:
            raise UserError(lines[-1].removeprefix("error: ") if lines else f"the run ended with {child.returncode}")
        return self.nodes

    def _follow(
        self,
        child: "subprocess.Popen[bytes]",
        told: dict[Path, int],
        callbacks: Sequence[Callable[[str, Row], object]],
    ) -> None:
        """Wait for the run's end, and tell of the rounds after those that were `told` of, of each once.

        Ctrl-C reaches the run, which ends in order.
        """
        tails = {folder: MetricsTail(folder / "metrics.jsonl") for folder in told}
        is_over = False
        while not is_over:
            try:
                is_over = child.poll() is not None
                for folder, tail in tails.items():
                    for row in tail.poll():
                        if row["round"] > told[folder]:
                            told[folder] = row["round"]
                            for callback in callbacks:
                                callback(folder.name, row)
                if not is_over:
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                continue

    @property
    def nodes(self) -> "list[Node]":
        """The nodes of the run, by their folders."""
        return [Node(folder=self.out / "nodes" / f"n{index}") for index in range(self._count)]


def _rounds_done(folder: Path) -> int:
    return max((row["round"] for row in read_metrics(folder / "metrics.jsonl", ["round"])), default=0)


def spec_of(function: Callable[..., Any]) -> str | None:
    """Return how a function is named that another process can import; None if none can."""
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if not name.isidentifier() or module == "__main__" or getattr(sys.modules.get(module), name, None) is not function:
        return None
    if module.partition(".")[0] in importlib.metadata.packages_distributions():
        return f"{module}:{name}"
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    return f"{Path(file).absolute()}:{name}" if file and file.endswith(".py") else None


def _label(data: Rows) -> str:
    """Return the name of rows, by which nodes know them: of a file its stem."""
    if isinstance(data, str | Path):
        return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in Path(data).stem)
    return "rows"


def _as_callbacks(callbacks: Sequence[Any], folder: Path) -> list[Any]:
    """Return callbacks of transformers for all, those included that want a round's metrics."""
    from transformers import TrainerCallback

    class Telling(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
        """Tells a function of each round."""

        def __init__(self, function: AfterRound) -> None:
            self._function = function

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: object) -> None:
            self._tail = MetricsTail(folder / "metrics.jsonl")
            self._tail.poll()  # rounds that were told of before

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: object) -> Any:
            for row in self._tail.poll():
                if self._function(row) is True:
                    control.should_training_stop = control.should_save = True
            return control

    functions = [
        callback() if isinstance(callback, type) and issubclass(callback, TrainerCallback) else callback
        for callback in callbacks
    ]
    return [function if isinstance(function, TrainerCallback) else Telling(function) for function in functions]
