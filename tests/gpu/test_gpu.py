"""What only a GPU shows. `make gpu` runs these; GOSSAMER_GPU_TESTS=cpu tries them on a processor, as far as they go."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import SHAPES, make_model
from node.config import PolicyConfig, load_config
from node.engines import Generated, SamplingParams
from node.engines.hand_over import policy_logprobs
from node.engines.hf import HfEngine
from node.operations.presets import with_preset
from node.policy.detection import detect_machine, measure_model
from node.policy.load import Policy, load_policy
from node.policy.memory import memory_held
from node.run import run_node
from tests.swarms import rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = os.environ.get("GOSSAMER_GPU_TESTS", "cuda")
SAMPLING = SamplingParams(temperature=0.8, top_p=1.0, max_completion_length=12)
PROMPTS = [[5, 6, 7], [8, 9], [11, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.fail("torch sees no GPU here; GOSSAMER_GPU_TESTS=cpu tries the tests on the processor")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(SHAPES["tiny"]._replace(vocabulary=20_000), folder)
    return folder


@pytest.fixture
def policy(model: Path) -> Policy:
    return load_policy(PolicyConfig(model=str(model), device=DEVICE, dtype="float32"), bf16=False)


def mean_error(policy: Policy, made: list[list[Generated]]) -> float:
    policy = replace(policy)
    errors = []
    for prompt, group in zip(PROMPTS, made, strict=True):
        for completion in group:
            ours = policy_logprobs(policy, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
            errors += [abs(a - b) for a, b in zip(ours, completion.logprobs or (), strict=True)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_each_way_to_generate_gives_the_policys_own_log_probabilities(policy: Policy, paged: bool, bf16: bool) -> None:
    policy = replace(policy, bf16=bf16)
    engine = HfEngine(policy, paged=paged, ahead=True)
    engine.load(0)
    at_one = replace(SAMPLING, temperature=1.0)
    made = engine.generate(PROMPTS, 8, at_one, seed=1)
    assert mean_error(policy, made) < (0.05 if bf16 else 1e-3)
    assert len({completion.token_ids for group in made for completion in group}) > 20
    print(f"paged={paged} bf16={bf16}: {'by pages' if engine._paged else 'padded'}")


@pytest.mark.parametrize(
    ("lora", "more"), [(0, ()), (8, ()), (8, ("policy.dtype=nf4",)), (0, ("trainer.trl.optim=adamw_8bit",))]
)
def test_a_node_trains_a_model_on_the_gpu_and_goes_on(
    model: Path, tmp_path: Path, lora: int, more: tuple[str, ...]
) -> None:
    settings = [
        *more,
        f"policy.model={model}",
        f"policy.device={DEVICE}",
        f"policy.lora.r={lora}",
        "network.enabled=false",
        "sampling.external=0",
        "seed=1",
        "trainer.save_steps=2",
        "engine.max_completion_length=24",
        'tasks=[{name="builtin", options={partial=true}}]',
    ]
    for rounds in (3, 5):
        config, _ = with_preset(load_config(None, [*settings, f"rounds={rounds}"]))
        run_node(config, tmp_path)
    assert [row["round"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_the_estimate_of_memory_covers_what_torch_held(tmp_path: Path) -> None:
    make_model(SHAPES["0.5B"]._replace(layers=4) if DEVICE == "cuda" else SHAPES["tiny"], tmp_path / "model")
    settings = [
        f"policy.model={tmp_path / 'model'}",
        f"policy.device={DEVICE}",
        "network.enabled=false",
        "sampling.external=0",
        "rounds=2",
        "engine.kind=hf",
    ]
    config, _ = with_preset(load_config(None, settings))
    size = measure_model(str(tmp_path / "model"))
    estimated = memory_held(size, config, detect_machine(DEVICE)).peak()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run_node(config, tmp_path / "node")
    if DEVICE == "cuda":
        took = torch.cuda.max_memory_allocated()
        print(f"estimated {estimated / 1e9:.2f} GB, took {took / 1e9:.2f} GB")
        assert took <= estimated < 4 * took


def test_without_memory_for_all_rows_fewer_are_generated_at_once(policy: Policy) -> None:
    if DEVICE == "cuda":
        free, _ = torch.cuda.mem_get_info()
        held = torch.empty(int(free * 0.97), dtype=torch.uint8, device="cuda")  # so that 256 rows have no room
    engine = HfEngine(policy)
    made = engine.generate([[5] * 500] * 32, 8, SAMPLING, seed=1)
    assert [len(group) for group in made] == [8] * 32
    if DEVICE == "cuda":
        print(f"rows at once: {engine._most}, beside {held.nbytes / 1e9:.1f} GB")
