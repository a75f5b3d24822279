"""The process that holds vLLM: `python -P vllm_worker.py CHANNEL LIFE`, started by `node.engines.vllm`.

It may run under another interpreter than the node, so it imports the standard library,
vLLM and `node.processes.worker_process`, nothing else. It answers one request at a time on the socket
CHANNEL; the pipe LIFE ends when the node does. Its standard output and error are a log file,
where vLLM may print what it likes.

    {"call": "start", "model": folder, ...}             -> {"vllm": version, "device": "cpu" | "cuda", "sleeps": bool}
    {"call": "load", "path": file, "dtype": ...,        -> {}   weights; `node.engines.hand_over` wrote them
     "tensors": [[name, shape, first byte], ...]}
    {"call": "adapt", "folder": folder, "number": int}  -> {}   adapters, by another number each time
    {"call": "rest"}                                    -> {}   gives the device's memory back until the next load
    {"call": "held"}                                    -> {"checksums": [[int, int] of each of vLLM's processes]}
    {"call": "score", "tokens": [id, ...]}              -> {"logprobs": [nats of the second, third, ... token]}
    {"call": "generate", "prompts": [[id, ...], ...],   -> {"completions": per prompt, per completion,
     "seeds": [int, ...], "n": ..., ...}                    [[id, ...], [nats, ...] or null]}
"""

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the interpreter may not have `node` installed
from node.processes.worker_process import Message, connect

del sys.path[0]  # nothing else is imported from there

EXIT_NO_VLLM = 3
CHECKED = 1 << 22  # numbers that a checksum looks at together: 64 MiB
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def main() -> None:
    """Answer until the node closes the channel."""
    requests = connect(*map(int, sys.argv[1:3]))
    if importlib.util.find_spec("vllm") is None:
        sys.exit(EXIT_NO_VLLM)
    engine = WorkerEngine(requests.receive())
    requests.reply(engine.describe())
    calls = {
        "load": engine.load,
        "adapt": engine.adapt,
        "rest": engine.rest,
        "held": engine.held,
        "score": engine.score,
        "generate": engine.generate,
    }
    while True:
        request = requests.receive()
        requests.reply(calls[request["call"]](request))


class WorkerEngine:
    """vLLM's engine, in this very process: a third process might outlive the others.

    With weights of its own the model starts with random ones, which the first `load` replaces.
    """

    def __init__(self, request: Message) -> None:
        import vllm
        from vllm.platforms import current_platform

        self._vllm = vllm
        self._device = current_platform.device_type
        on_cpu, rank = current_platform.is_cpu(), request["lora_rank"]
        self._sleeps = bool(request["sleeps"]) and not on_cpu
        self._asleep = False
        self._adapters: Any = None
        own: dict[str, Any] = {}
        if on_cpu:
            # On a CPU vLLM 0.31 fails at a prompt split between two steps: it rewinds the request's generator, and
            # those of a CPU cannot be rewound.
            own |= {"kv_cache_memory_bytes": request["cpu_cache_bytes"], "enable_chunked_prefill": False}
        else:
            own |= {"gpu_memory_utilization": request["gpu_memory_utilization"], "enable_sleep_mode": self._sleeps}
        if rank:
            own |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(most for most in RANKS if most >= rank)}
        self._keeps_weights = rank > 0
        self._dtype = request["dtype"]
        self._llm = vllm.LLM(
            model=request["model"],
            load_format="auto" if self._keeps_weights else "dummy",
            dtype=request["dtype"],
            max_model_len=request["max_model_len"],
            tensor_parallel_size=request["tensor_parallel_size"],
            enforce_eager=on_cpu,  # compiling takes half a minute there
            skip_tokenizer_init=True,  # token ids in, token ids out
            generation_config="vllm",  # no sampling defaults out of the model's folder
            logprobs_mode="processed_logprobs",  # after the temperature: what the trainer computes
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
            **own,
        )

    def describe(self) -> Message:
        """Say what runs here."""
        return {"vllm": self._vllm.__version__, "device": self._device, "sleeps": self._sleeps}

    def load(self, request: Message) -> Message:
        """Take new weights, and forget what was computed with the old ones."""
        if self._asleep:
            self._llm.wake_up(["weights"])
        given = {name: request[name] for name in ("path", "dtype", "tensors")}
        self._llm.collective_rpc(take_weights, kwargs=given)
        if self._asleep:
            self._llm.wake_up(["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()
        return {}

    def adapt(self, request: Message) -> Message:
        """Take new adapters; another number each time, as vLLM serves the old ones under a number that it knows."""
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        from vllm.lora.request import LoRARequest

        self._adapters = LoRARequest("policy", request["number"], request["folder"])
        self._llm.llm_engine.add_lora(self._adapters)
        self._llm.reset_prefix_cache()
        return {}

    def rest(self, request: Message) -> Message:
        """Give the device's memory back: the cache, and the weights.

        Weights that only adapters change are kept in main memory. Others come with the next `load`.
        """
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1 if self._keeps_weights else 2)
            self._asleep = True
        return {}

    def held(self, request: Message) -> Message:
        """Return checksums of the weights, or of the adapters, that are computed with."""
        asked = {"adapters": self._keeps_weights, "dtype": self._dtype}
        return {"checksums": self._llm.collective_rpc(checksum_of_held, kwargs=asked)}

    def score(self, request: Message) -> Message:
        """Return the log-probability of each of the given tokens after the first."""
        tokens = request["tokens"]
        params = self._vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = self._run([tokens], params)
        entries = output.prompt_logprobs[1:]
        return {"logprobs": [entry[token].logprob for token, entry in zip(tokens[1:], entries, strict=True)]}

    def generate(self, request: Message) -> Message:
        """Sample `n` completions of every prompt in one batch, each prompt from a seed of its own.

        Number i of a prompt has its seed plus i. Without seeds vLLM's model runner draws from where it likes: on GPUs
        from numpy, whatever torch is seeded with.
        """
        asked = {
            "n": request["n"],
            "temperature": request["temperature"],
            "top_p": request["top_p"],
            "max_tokens": request["max_tokens"],
            "stop_token_ids": request["stop"],
            "ignore_eos": True,  # the node names every token that ends a text
            "logprobs": 0 if request["logprobs"] else None,  # of the sampled token alone
            "detokenize": False,
        }
        params = [self._vllm.SamplingParams(**asked, seed=seed) for seed in request["seeds"]]
        outputs = self._run(request["prompts"], params)
        return {"completions": [[_completion(completion) for completion in output.outputs] for output in outputs]}

    def _run(self, prompts: list[list[int]], params: Any) -> Any:
        adapters = {"lora_request": self._adapters} if self._adapters is not None else {}
        return self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False, **adapters
        )


def checksum_of_held(worker: Any, adapters: bool, dtype: str) -> list[int]:
    """Return the checksum of all weights, or of all adapters, that a worker of vLLM computes with."""
    model = worker.model_runner.get_model()
    if not adapters:
        return checksum(model.parameters(), dtype)
    names = ("lora_a_stacked", "lora_b_stacked")  # a matrix for each layer that vLLM has merged into one
    return checksum(
        (tensor for layer in model.modules() for name in names for tensor in getattr(layer, name, ())), dtype
    )


def checksum(tensors: Iterable[Any], dtype: str) -> list[int]:
    """Return the sum of all numbers' bits, and that of their squares, modulo 2**64.

    It depends on neither the order of numbers nor on zeros beside them: vLLM merges matrices, and fills them up.
    """
    import torch

    number = getattr(torch, dtype)
    bits = {2: torch.int16, 4: torch.int32}[number.itemsize]
    sums = [0, 0]
    for tensor in tensors:
        for part in tensor.detach().to(number).flatten().split(CHECKED):
            wide = part.view(bits).long()
            sums = [total + int(of.sum()) for total, of in zip(sums, (wide, wide * wide), strict=True)]
    return [total % 2**64 for total in sums]


def take_weights(worker: Any, path: str, dtype: str, tensors: list[Any]) -> None:
    """Put weights from shared memory into the model of a worker of vLLM, which runs this in each of its processes."""
    import math
    import mmap
    from pathlib import Path

    import torch

    with Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    whole, number = torch.frombuffer(memory, dtype=torch.uint8), getattr(torch, dtype)

    def weights() -> Any:
        for name, shape, start in tensors:
            yield name, whole[start : start + math.prod(shape) * number.itemsize].view(number).view(shape)

    worker.reload_weights(weights_iterator=weights())  # with vLLM's configuration set, which some layers ask for
    model = worker.model_runner.get_model()
    if (head := getattr(model, "lm_head", None)) is not None and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)  # a CPU packs the matrix, which a reload leaves as it was
    if worker.device.type == "cpu":  # which packs experts too, and a reload (0.31) leaves them unpacked
        for layer in model.modules():
            kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                kernel.fused_experts.process_weights_after_loading(layer)


def _completion(one: Any) -> list[Any]:
    tokens = list(one.token_ids)
    if one.logprobs is None:
        return [tokens, None]
    return [tokens, [entry[token].logprob for token, entry in zip(tokens, one.logprobs, strict=True)]]


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
