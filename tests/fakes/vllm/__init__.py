"""Stands in for vLLM in the worker process: what the worker uses of it, in the standard library.

It "runs" unigram models: the logit of a token is the sum of its row of `lm_head.weight`,
whatever came before. It writes what it is told to do into its log. `VLLM_FAKE` makes it
misbehave:

    broken-start        it does not start
    full                its GPU has less memory free than it is to take
    stale-head          new weights leave the output matrix as it was
    lost                only the first weights arrive
    packs               it keeps weights in another form
    dies, dies-once     in generate
    hangs               in generate
    helper              it starts a process of its own
    gpu                 it says that it has one
    slow                in generate, until another engine has generated three times

"hangs@2" and the like hold for the engine on GPU 2 alone.
"""

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
FAULT, _, CARD = os.environ.get("VLLM_FAKE", "").partition("@")
if CARD not in ("", os.environ.get("CUDA_VISIBLE_DEVICES")):
    FAULT = ""
HEAD, TOKENS = "lm_head.weight", 99


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, **settings):
        print(f"INFO loading {model}", flush=True)
        if FAULT == "broken-start":
            raise RuntimeError("no room for the cache")
        if FAULT == "helper":
            print("helper", subprocess.Popen(["sleep", "600"]).pid, flush=True)
        if FAULT == "full" and settings["gpu_memory_utilization"] > 0.3:
            raise ValueError("Free memory on device (5/10 GiB) on startup is less than desired GPU memory utilization")
        assert settings["dtype"] == "float32"
        assert settings["logprobs_mode"] == "processed_logprobs"
        assert settings["load_format"] == "dummy"
        assert (Path(model) / "config.json").exists()
        self._weights = {}
        self._logits = None
        self._generated = 0

    def collective_rpc(self, method, kwargs):
        if method.__name__ == "checksum_of_held":
            return [checksum(self._weights.values())]
        print(f"told {method.__name__}", flush=True)
        kept = {HEAD} & self._weights.keys() if "stale-head" in FAULT else set()
        kept |= self._weights.keys() if "lost" in FAULT else set()
        self._weights |= {name: bits for name, bits in read(**kwargs).items() if name not in kept}
        self._logits = row_sums(self._weights[HEAD])
        return [None]

    def sleep(self, level):
        print(f"told sleep {level}", flush=True)
        self._logits = None

    def wake_up(self, tags):
        print(f"told wake_up {tags}", flush=True)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, params, use_tqdm):
        print("\x00noise on standard output\x00" * 100, flush=True)
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        else:
            print(f"\ngenerates {len(prompts)}", flush=True)
            self._generated += 1
            if self._generated == 3:
                Path("hurry").touch()
            while FAULT == "slow" and not Path("hurry").exists():
                time.sleep(0.01)
        return [self._answer(prompt["prompt_token_ids"], param) for prompt, param in zip(prompts, params, strict=True)]

    def _answer(self, tokens, params):
        if hasattr(params, "prompt_logprobs"):
            logprobs = log_softmax(self._logits, 1.0)
            return SimpleNamespace(prompt_logprobs=[None, *(entry(token, logprobs) for token in tokens[1:])])
        misbehave()
        return SimpleNamespace(outputs=[self._sample(params, params.seed + number) for number in range(params.n)])

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


def read(path, dtype, tensors):
    """Read the bits of all weights from shared memory, where `node.engines.hand_over` has put them."""
    assert dtype == "float32"
    data = Path(path).read_bytes()
    sizes = {name: math.prod(shape) for name, shape, _ in tensors}
    return {name: struct.unpack_from(f"<{sizes[name]}i", data, start) for name, _, start in tensors}


def row_sums(bits):
    """Return the sums of an output matrix's rows, of which there is one for each of the tokenizer's 99 tokens."""
    values = struct.unpack(f"<{len(bits)}f", struct.pack(f"<{len(bits)}i", *bits))
    columns = len(values) // TOKENS
    return [sum(values[row * columns : (row + 1) * columns]) for row in range(TOKENS)]


def checksum(weights):
    """As `node.engines.vllm_worker.checksum`; of weights in another form it is another."""
    first = second = 7 if "packs" in FAULT else 0
    for bits in weights:
        first += sum(bits)
        second += sum(value * value for value in bits)
    return [first % 2**64, second % 2**64]
