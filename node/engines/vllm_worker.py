"""The process that holds vLLM: `python -P vllm_worker.py CHANNEL LIFE`, started by `node.engines.vllm`.

It may run under another interpreter than the node, so it imports the standard library,
vLLM and `node.processes.worker_process`, nothing else. It answers one request at a time on the socket
CHANNEL; the pipe LIFE ends when the node does. Its standard output and error are a log file,
where vLLM may print what it likes.

    {"call": "start", "model": folder, ...}             -> {"vllm": version, "device": "cpu" | "cuda" | ...}
    {"call": "load", "folder": folder}                  -> {}
    {"call": "score", "tokens": [id, ...]}              -> {"logprobs": [nats of the second, third, ... token]}
    {"call": "generate", "prompts": [[id, ...], ...],   -> {"completions": per prompt, per completion,
     "seeds": one a prompt, "n": ..., ...}                  [[id, ...], [nats, ...] or null]}
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the interpreter may know no node
from node.processes.worker_process import Message, connect, receive, send

del sys.path[0]  # and is to import nothing else from there

EXIT_NO_VLLM = 3


def main() -> None:
    """Answer until the node closes the channel."""
    channel = connect(*map(int, sys.argv[1:3]))
    if importlib.util.find_spec("vllm") is None:
        sys.exit(EXIT_NO_VLLM)
    engine = Engine(receive(channel))
    send(channel, engine.describe())
    calls = {"load": engine.load, "score": engine.score, "generate": engine.generate}
    while True:
        request = receive(channel)
        send(channel, calls[request["call"]](request))


class Engine:
    """vLLM's engine, in this very process, so that there is no third one to outlive anybody."""

    def __init__(self, request: Message) -> None:
        import vllm
        from vllm.platforms import current_platform

        self._vllm = vllm
        self._device = current_platform.device_type
        if current_platform.is_cpu():
            # A prompt split between two steps ends vLLM 0.31 there: it takes back a draw from the request's
            # generator, which generators on a CPU cannot do.
            own = {"kv_cache_memory_bytes": request["kv_cache_bytes"], "enable_chunked_prefill": False}
        else:
            own = {"gpu_memory_utilization": request["gpu_memory_utilization"]}
        self._llm = vllm.LLM(
            model=request["model"],
            dtype=request["dtype"],
            max_model_len=request["max_model_len"],
            tensor_parallel_size=request["tensor_parallel_size"],
            enforce_eager=request["enforce_eager"],
            skip_tokenizer_init=True,  # token ids in, token ids out
            generation_config="vllm",  # no sampling defaults out of the model's folder
            logprobs_mode="processed_logprobs",  # after the temperature: what the trainer computes
            enable_prefix_caching=True,
            disable_log_stats=True,
            **own,
        )

    def describe(self) -> Message:
        """Say what runs here."""
        return {"vllm": self._vllm.__version__, "device": self._device}

    def load(self, request: Message) -> Message:
        """Replace the weights by those in a folder and forget what was computed with the old ones."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": request["folder"]})
        self._llm.reset_prefix_cache()
        return {}

    def score(self, request: Message) -> Message:
        """Return the log-probability of each of the given tokens after the first."""
        tokens = request["tokens"]
        params = self._vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = self._llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        entries = output.prompt_logprobs[1:]
        return {"logprobs": [entry[token].logprob for token, entry in zip(tokens[1:], entries, strict=True)]}

    def generate(self, request: Message) -> Message:
        """Sample `n` completions of every prompt in one batch."""
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        params = [
            self._vllm.SamplingParams(
                n=request["n"],
                seed=seed,  # vLLM gives completion i the seed + i
                temperature=request["temperature"],
                top_p=request["top_p"],
                max_tokens=request["max_tokens"],
                stop_token_ids=request["stop"],
                ignore_eos=True,  # the node names every token that ends a text
                logprobs=0 if request["logprobs"] else None,  # of the sampled token alone
                detokenize=False,
            )
            for seed in request["seeds"]
        ]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return {"completions": [[_completion(one) for one in output.outputs] for output in outputs]}


def _completion(one: Any) -> list[Any]:
    tokens = list(one.token_ids)
    if one.logprobs is None:
        return [tokens, None]
    return [tokens, [entry[token].logprob for token, entry in zip(tokens, one.logprobs, strict=True)]]


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
