"""Rollouts by vLLM's own server, on this machine or on another, or by several of them.

    vllm serve MODEL --logprobs-mode processed_logprobs             with VLLM_SERVER_DEV_MODE=1 in its environment
    ... --enable-lora --max-lora-rank R                             for adapters, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1

A round's questions are divided among the servers that answer. Each question is a request of its own: all prompts of a
request would have its seed, so that completions of the same number would be drawn alike.

New weights are written to the node's folder, which a server has to see under the same path, and loaded by its
`/collective_rpc`; adapters by `/v1/load_lora_adapter`. Each batch is preceded by a probe (`hand_over`): a server that
was started again has lost the weights, and does not say so. That a part of the weights did not arrive shows only if it
moves probabilities by more than rounding does.

A server that fails, or lacks the weights, is left out until the next round. Its questions go to the others. If it fails
again, it is left out for longer each time, in proportion to the seconds that the failure took: a server that hangs
costs little. Before it is used again it has to complete a short text within `QUICK_S`: a server whose engine hangs
still says what it serves. If all are left out, all are tried.
"""

import json
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import structlog

from node.config import EngineConfig
from node.engines import EngineError, Generated, SamplingParams, seed_of_prompt
from node.engines.hand_over import (
    DTYPE,
    AdapterFolder,
    ProbeAnswers,
    WeightMismatchError,
    adapters_of,
    digest,
    expected_probe,
    probe_tokens,
    remove_leftovers,
)
from node.policy.export import export_weights
from node.policy.load import Policy
from node.processes.threads import on_daemon

WEIGHTS = "weights-"  # how the names of folders with handed over weights begin
ADAPTERS = "gossamer"  # what a server calls them
NO_DEFAULTS = {  # a server takes what a request leaves out from the model's generation_config.json
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
AT_ONCE = 64  # requests to a server: it computes them together, and each is a connection and a thread here
QUICK_S = 10.0  # for a question that takes a server no time
LONGEST_PAUSE = 30  # times what a failure took: a server that always fails costs at most a thirtieth of the time

log = structlog.get_logger()


def make(config: EngineConfig, policy: Policy, folder: Path) -> "ServerEngine":
    """Return the engine."""
    return ServerEngine(policy, config, folder)


class ServerError(Exception):
    """A server did not answer, or said no; the text names it and its reason."""


@dataclass(slots=True)
class Server:
    """One server, and which weights it has."""

    url: str
    given: tuple[float, ...] = ()  # digest of the weights that it was given
    answers: ProbeAnswers = field(default_factory=ProbeAnswers)  # to the probe
    model: str = ""  # what it calls its model
    failed: str = ""  # why it is left out
    failures: int = 0  # since it last answered for a part of a round
    due: float = 0.0  # when it is tried again, on the engine's clock

    def call(self, path: str, body: Any, timeout: float) -> Any:
        """Ask for `path`, with `body` as JSON if there is one; return what it answers, None if that is no JSON.

        Raises:
            ServerError: there is no good answer within `timeout` seconds.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # the configuration admits http and https alone
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())
            raise ServerError(f"{self.url}{path} answers {error.code}: {said[:300]}") from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(f"{self.url}{path} does not answer: {reason}") from error
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            return None


class ServerEngine:
    """Generates by the servers of `engine.placement`.

    Args:
        policy: whose weights are taken, and whose tokenizer reads the completions.
        config: the engine's part of the configuration.
        folder: the node's, in which weights lie while they are handed over.
        clock: seconds.
    """

    def __init__(
        self, policy: Policy, config: EngineConfig, folder: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy = policy
        self._config = config
        self._folder = folder.absolute()  # a server begins a relative path at its own folder
        self._clock = clock
        remove_leftovers(folder, WEIGHTS)  # of a process that was killed
        self._servers = [Server(url) for url in config.servers]
        self._adapters = AdapterFolder(self._folder, in_memory=False) if adapters_of(policy) else None
        self._probe_ids = probe_tokens(policy, config.longest)
        self._probe_body = {"prompt": self._probe_ids, "max_tokens": 1, "prompt_logprobs": 0}
        self._expected: list[float] = []  # what a server with the weights should say of the probe
        self._version = 0
        self._wanted: tuple[float, ...] = ()

    def load(self, version: int) -> None:
        """Give the trainer's weights to every server that lacks them, also to one that failed and is due again."""
        self._version, now = version, digest(self._policy)
        if now != self._wanted:
            self._expected = expected_probe(self._policy, self._probe_ids)
            self._wanted = now
        behind = [server for server in self._servers if server.given != self._wanted or server.failed]
        due = [server for server in behind if not server.failed or self._clock() >= server.due]
        if len(behind) < len(self._servers) and not due:
            return
        with self._written() as folder:
            hand_over = partial(self._hand_over, folder=folder)
            self._try_each([(server, hand_over) for server in due])
            if all(server.failed for server in self._servers):
                self._try_each([(server, hand_over) for server in behind if server not in due])

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        made: dict[int, list[Generated]] = {}
        while open_prompts := [at for at in range(len(prompts)) if at not in made]:
            servers = [server for server in self._servers if not server.failed and server.given]
            if not servers:
                raise EngineError("no server answers: " + "; ".join(server.failed for server in self._servers))
            parts = [open_prompts[at :: len(servers)] for at in range(len(servers))]

            def ask(server: Server, part: list[int]) -> None:
                self._probe(server)
                waiting = iter(part)  # for the next thread that is free

                def ask_in_turn() -> list[tuple[int, list[Generated]]]:
                    return [
                        (at, self._ask(server, prompts[at], n, sampling, seed_of_prompt(seed, at))) for at in waiting
                    ]

                threads = [on_daemon(ask_in_turn, "question") for _ in range(min(len(part), AT_ONCE))]
                made.update(answer for thread in threads for answer in thread.result())
                server.failures = 0

            self._try_each([(one, partial(ask, part=part)) for one, part in zip(servers, parts, strict=True) if part])
        return [made[at] for at in range(len(prompts))]

    def rest(self) -> None:
        """Do nothing: the trainer's device is not in use."""

    def close(self) -> None:
        """Remove the adapters that were handed over; the servers stay as they are."""
        if self._adapters is not None:
            self._adapters.close()

    def _try_each(self, uses: Sequence[tuple[Server, Callable[[Server], None]]]) -> None:
        """Use each of these servers at the same time; leave those out that fail."""
        for done in [on_daemon(partial(self._try, server, use), "server") for server, use in uses]:
            done.result()  # on a daemon: the end of a process that has given up a round waits for no server

    def _try(self, server: Server, use: Callable[[Server], None]) -> None:
        began = self._clock()
        try:
            use(server)
        except (ServerError, WeightMismatchError) as error:
            if not server.failed:
                log.warning("a server is left out", url=server.url, reason=str(error))
            server.failed, server.model = str(error), ""  # it is asked for its model first, which takes it no time
            server.failures += 1
            now = self._clock()
            # At once after a first failure: a server that was started again wants its weights.
            server.due = now + max(now - began, QUICK_S) * min(2**server.failures - 2, LONGEST_PAUSE)
        else:
            if server.failed:
                log.info("a server is back", url=server.url)
            server.failed = ""

    @contextmanager
    def _written(self) -> Iterator[Path]:
        """The weights, or the adapters, in a folder, for as long as the block lasts."""
        if self._adapters is not None:
            yield self._adapters.write(self._policy)
            return
        folder = Path(tempfile.mkdtemp(dir=self._folder, prefix=WEIGHTS))
        try:
            export_weights(self._policy.model, folder, DTYPE)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _hand_over(self, server: Server, folder: Path) -> None:
        timeout = self._config.timeout
        if not server.model:
            models = server.call("/v1/models", None, QUICK_S)
            try:
                server.model = str(models["data"][0]["id"])
            except (TypeError, LookupError):
                raise ServerError(f"{server.url} names no model: is it vLLM's server?") from None
        if server.failed or not server.given:
            said = self._answer(server, server.model, QUICK_S if server.failed else timeout)
            if not server.given:
                server.answers.begin(said)
        if self._adapters is not None:
            body = {"lora_name": ADAPTERS, "lora_path": str(folder), "load_inplace": True}
            server.call("/v1/load_lora_adapter", body, timeout)
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": timeout}
            server.call("/collective_rpc", body, timeout)
        server.call("/reset_prefix_cache", {}, QUICK_S)
        if server.given != self._wanted:
            server.answers.renew()
        server.given = self._wanted

    def _probe(self, server: Server) -> None:
        model = server.model if self._adapters is None else ADAPTERS
        server.answers.check(self._expected, self._answer(server, model, self._config.timeout), self._version)

    def _answer(self, server: Server, model: str, timeout: float) -> list[float]:
        """Return the log-probabilities, in nats, of the probe's tokens by one of the server's models."""
        answer = server.call("/v1/completions", {"model": model, **self._probe_body}, timeout)
        try:
            entries = answer["choices"][0]["prompt_logprobs"][1:]
            return [
                float(entry[str(token)]["logprob"]) for token, entry in zip(self._probe_ids[1:], entries, strict=True)
            ]
        except (TypeError, LookupError, ValueError) as error:
            raise ServerError(f"{server.url} gives no log-probabilities of a prompt ({error!r})") from error

    def _named(self, server: Server, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": server.model if self._adapters is None else ADAPTERS, **body}

    def _ask(
        self, server: Server, prompt: Sequence[int], n: int, sampling: SamplingParams, seed: int
    ) -> list[Generated]:
        whole = sampling.top_p == 1  # else its log-probabilities are of the nucleus
        body = {
            "prompt": list(prompt),
            "n": n,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **NO_DEFAULTS,
            "max_tokens": sampling.max_completion_length,
            "stop_token_ids": list(self._policy.eos_token_ids),
            "ignore_eos": True,
            "return_token_ids": True,
            **({"logprobs": 0} if whole else {}),
        }
        answer = server.call("/v1/completions", self._named(server, body), self._config.timeout)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            made = [self._read(choice, whole) for choice in choices]
        except (TypeError, LookupError, ValueError) as error:
            raise ServerError(f"{server.url} answers what vLLM's server would not ({error!r})") from error
        if len(made) != n:
            raise ServerError(f"{server.url} answers {len(made)} completions, and {n} were asked for")
        return made

    def _read(self, choice: dict[str, Any], whole: bool) -> Generated:
        tokens = tuple(int(token) for token in choice["token_ids"])
        logprobs = tuple(float(logprob) for logprob in choice["logprobs"]["token_logprobs"]) if whole else None
        if logprobs is not None and len(logprobs) != len(tokens):
            raise ValueError(f"{len(logprobs)} log-probabilities of {len(tokens)} tokens")
        finished = bool(tokens) and tokens[-1] in self._policy.eos_token_ids
        return Generated(tokens, self._policy.decode(tokens), finished, logprobs)
