"""Stands in for vLLM in the worker process: what the worker uses of it, in the standard library.

It "runs" unigram models: the logit of a token is the sum of its row of `lm_head.weight`,
whatever came before. `VLLM_FAKE` makes it misbehave: `broken-start`, `stale-head` (a reload
leaves the output matrix as it was), `dies`, `dies-once` (in generate), `hangs`, `helper`
(starts a process of its own).
"""

import json
import math
import os
import random
import signal
import struct
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.fake"
FAULT = os.environ.get("VLLM_FAKE", "")


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, **settings):
        print(f"INFO loading {model}", flush=True)
        if FAULT == "broken-start":
            raise RuntimeError("no room for the cache")
        if FAULT == "helper":
            print("helper", subprocess.Popen(["sleep", "600"]).pid, flush=True)
        assert settings["dtype"] == "float32"
        assert settings["logprobs_mode"] == "processed_logprobs"
        self._logits = read_logits(Path(model))

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        if FAULT != "stale-head":
            self._logits = read_logits(Path(kwargs["weights_path"]))

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, params, use_tqdm):
        print("\x00noise on standard output\x00" * 100, flush=True)
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        return [self._answer(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, params, strict=True)]

    def _answer(self, tokens, params):
        if hasattr(params, "prompt_logprobs"):
            logprobs = log_softmax(self._logits, 1.0)
            return SimpleNamespace(prompt_logprobs=[None, *(entry(token, logprobs) for token in tokens[1:])])
        misbehave()
        return SimpleNamespace(outputs=[self._sample(params, params.seed + index) for index in range(params.n)])

    def _sample(self, params, seed):
        rng = random.Random(seed)
        logprobs = log_softmax(self._logits, params.temperature)
        tokens = []
        while len(tokens) < params.max_tokens and (not tokens or tokens[-1] not in params.stop_token_ids):
            tokens += rng.choices(range(len(logprobs)), [math.exp(value) for value in logprobs])
        values = None if params.logprobs is None else [entry(token, logprobs) for token in tokens]
        return SimpleNamespace(token_ids=tokens, logprobs=values)


def misbehave():
    marker = Path("died")  # the worker's directory is the test's
    if FAULT == "dies" or (FAULT == "dies-once" and not marker.exists()):
        marker.touch()
        print("out of luck", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "hangs":
        time.sleep(600)


def entry(token, logprobs):
    return {token: SimpleNamespace(logprob=logprobs[token])}


def log_softmax(logits, temperature):
    scaled = [value / temperature for value in logits]
    top = max(scaled)
    norm = top + math.log(sum(math.exp(value - top) for value in scaled))
    return [value - norm for value in scaled]


def read_logits(folder):
    """Read the output matrix from safetensors: a length, a header in JSON, the numbers."""
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        about = json.loads(data[8 : 8 + size]).get("lm_head.weight")
        if about is not None:
            rows, columns = about["shape"]
            values = struct.unpack_from(f"<{rows * columns}f", data, 8 + size + about["data_offsets"][0])
            return [sum(values[row * columns : (row + 1) * columns]) for row in range(rows)]
    raise ValueError(f"{folder} has no output matrix")
