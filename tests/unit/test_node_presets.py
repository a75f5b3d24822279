"""Presets: what a model of some size wants on some machine, below all that a person set."""

import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from benchmarks.cards import CARDS, MODELS, choice, table
from node.config import NodeConfig, TrainerConfig, fill, is_set, parse_config
from node.errors import UserError
from node.operations.presets import SMALL, preset, preset_for, rate_warning
from node.policy.detection import find_model, looks_like_path, measure_model
from node.policy.load import BUILTIN
from node.policy.memory import BUILTIN_SIZE, Machine, ModelSize, answered_at_once, memory_held, vllm_sleeps
from node.run import run_node
from tests.policies import write_tiny_policy
from tests.swarms import small_config

LAPTOP = Machine(16 << 30)
SERVER = Machine(64 << 30, bf16=True)
GPU = Machine(80 << 30, gpu=True, bf16=True, vllm=True)


def asking(lora: int | None = None, dtype: str | None = None, engine: Mapping[str, object] | None = None) -> NodeConfig:
    """Return what a person set."""
    policy = ({} if lora is None else {"lora": {"r": lora}}) | ({} if dtype is None else {"dtype": dtype})
    return parse_config({"policy": policy, "engine": engine or {}})


def model(parameters: float, positions: int | None = 8192) -> ModelSize:
    return ModelSize(int(parameters), 30, 576, 1536, 9, 192, 49152, positions)


@pytest.mark.parametrize(
    ("parameters", "machine", "lora", "wants"),
    [
        (24e3, GPU, None, {"threads": 1}),
        (5e6, SERVER, None, {"threads": 1, "trainer.learning_rate": 1e-4}),
        (30e6, LAPTOP, None, {"trainer.learning_rate": 3e-5}),
        (
            135e6,
            SERVER,
            None,
            {
                "trainer.learning_rate": 1e-5,
                "engine.max_prompt_length": 512,
                "engine.max_completion_length": 32,
            },
        ),
        (
            1.7e9,
            LAPTOP,
            None,
            {
                "trainer.learning_rate": 3e-5,
                "policy.lora.r": 32,
                "policy.lora.alpha": 64,
                "engine.max_prompt_length": 512,
                "engine.max_completion_length": 32,
            },
        ),
        (
            7e9,
            GPU,
            None,
            {
                "trainer.learning_rate": 1e-5,
                "trainer.gradient_checkpointing": True,
                "policy.lora.r": 16,
                "policy.lora.alpha": 32,
                "policy.dtype": "bfloat16",
                "engine.kind": "vllm",
                "sampling.local": 32,
                "engine.max_prompt_length": 1024,
                "engine.max_completion_length": 256,
            },
        ),
        (30e6, LAPTOP, 8, {"trainer.learning_rate": 2e-4}),
        (135e6, LAPTOP, 0, {"trainer.learning_rate": 1e-5}),
    ],
)
def test_what_a_model_wants(parameters: float, machine: Machine, lora: int | None, wants: dict[str, object]) -> None:
    chosen = {key: choice.value for key, choice in preset(asking(lora), model(parameters), machine).items()}
    assert chosen | wants == chosen
    lesser = {
        "engine.max_prompt_length",
        "engine.max_completion_length",
        "trainer.save_full",
        "trainer.tokens_per_batch",
        "engine.vllm.gpu_memory_utilization",
    }
    assert chosen.keys() - wants.keys() <= lesser


sizes = st.builds(model, st.floats(1e3, 1e12), st.none() | st.integers(16, 1 << 20))
machines = st.builds(
    Machine,
    st.integers(1 << 28, 1 << 42),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 1024).map(lambda nodes: 1 / nodes),
    devices=st.integers(1, 8),
    nf4=st.booleans(),
    sharers=st.sampled_from([1, 1, 2, 8]),
)


@given(sizes, machines, st.none() | st.integers(0, 64), st.booleans())
def test_a_preset_can_always_be_run(size: ModelSize, machine: Machine, lora: int | None, thinks: bool) -> None:
    choices = preset(asking(lora), size, machine, thinks=thinks)
    config = fill(asking(lora), {key: choice.value for key, choice in choices.items()})
    asked = config.policy.lora.r if lora is None else lora
    assert rate_warning(config.trainer, size.parameters if asked == 0 else SMALL) == ""
    length = config.engine.max_prompt_length + config.engine.max_completion_length
    if size.parameters > SMALL and size.positions is not None and "engine.max_prompt_length" in choices:
        assert length <= size.positions
    assert config.engine.longest == length


@pytest.mark.parametrize(
    ("gigabytes", "ahead", "tokens"), [(80, 0, 8192), (16, 0, 4096), (24, 0, 2048), (8, 0, 1024), (80, 1, 2048)]
)
def test_a_large_gpu_takes_larger_micro_batches_unless_an_engine_wants_its_memory(
    gigabytes: int, ahead: int, tokens: int
) -> None:
    """On 24 GB all of its weights are trained, on 16 GB adapters, over weights of half as many bytes."""
    machine = GPU._replace(memory=gigabytes * 10**9)
    chosen = values(MODELS["Qwen3-0.6B"], machine, engine={"ahead": ahead})
    assert chosen.get("trainer.tokens_per_batch", TrainerConfig().tokens_per_batch) == tokens


@pytest.mark.parametrize(
    ("name", "gigabytes", "engine", "questions"),
    [
        ("Qwen3-0.6B", 16, {}, 8),
        ("Qwen3-0.6B", 24, {}, 8),
        ("Qwen3-0.6B", 48, {}, 16),
        ("Qwen3-0.6B", 80, {}, 32),
        ("Qwen3-8B", 80, {}, 16),
        ("Qwen3-0.6B", 24, {"placement": [1]}, 8),
        ("Qwen3-0.6B", 24, {"placement": [1, 2]}, 16),  # an engine on each
        ("Qwen3-8B", 24, {"placement": [1, 2]}, 8),
        ("Qwen3-8B", 24, {"placement": [1, 2, 3, 4]}, 16),
        ("Qwen3-0.6B", 80, {"max_completion_length": 4096}, 8),
        ("Qwen3-0.6B", 80, {"kind": "server", "placement": ["http://box:8000"]}, 8),
    ],
)
def test_a_round_is_as_large_as_the_cards_answer_at_once(
    name: str, gigabytes: int, engine: dict[str, Any], questions: int
) -> None:
    machine = GPU._replace(memory=gigabytes * 10**9)
    asked = asking(engine={"kind": "vllm", **engine} if "placement" in engine else engine)
    choices = preset(asked, MODELS[name], machine)
    assert choices["sampling.local"].value == questions
    eight = fill(asked, {key: choice.value for key, choice in choices.items()} | {"sampling.local": 8})
    many = fill(asked, {key: choice.value for key, choice in choices.items()})
    assert memory_held(MODELS[name], many, machine) == memory_held(MODELS[name], eight, machine), "it costs no memory"


def test_a_round_that_a_person_bounds_stays_so() -> None:
    asked = parse_config({"sampling": {"questions": 8}})
    assert preset(asked, MODELS["Qwen3-0.6B"], GPU)["sampling.local"].value == 8
    long = parse_config({"sampling": {"completions": 64}})
    assert preset(long, MODELS["Qwen3-0.6B"], GPU)["sampling.local"].value == 8


@pytest.mark.parametrize(("gigabytes", "tokens"), [(64, 2048), (16, 2048), (5, 512), (1, 256)])
def test_a_small_machine_takes_smaller_micro_batches(gigabytes: int, tokens: int) -> None:
    choices = preset(NodeConfig(), model(135e6), Machine(gigabytes << 30))
    config = fill(NodeConfig(), {key: choice.value for key, choice in choices.items()})
    assert config.trainer.tokens_per_batch == tokens


def test_the_builtin_policy_keeps_the_defaults_but_for_its_one_thread() -> None:
    assert measure_model(str(BUILTIN)) == BUILTIN_SIZE
    config = NodeConfig()
    choices = preset_for(config)
    assert {key: choice.value for key, choice in choices.items()} == {"threads": 1}


def test_nodes_that_share_a_gpu_share_vllms_part_of_it() -> None:
    alone, shared = (preset(NodeConfig(), model(135e6), GPU._replace(share=share)) for share in (1, 0.25))
    quarter = alone[SHARE].value / 4  # less what the larger GPU's chunk of logits takes
    assert 0.94 * quarter < shared[SHARE].value < quarter


@pytest.mark.parametrize(
    ("name", "gigabytes", "sleeps"),
    [
        ("Qwen3-0.6B", 16, True),
        ("Qwen3-0.6B", 24, True),
        ("Qwen3-0.6B", 48, True),
        ("Qwen3-0.6B", 80, False),
        ("Qwen3-8B", 48, True),
        ("Qwen3-8B", 80, False),
    ],
)
def test_vllm_stays_awake_beside_the_update_where_that_costs_no_answer_of_a_round(
    name: str, gigabytes: int, sleeps: bool
) -> None:
    size, machine = MODELS[name], GPU._replace(memory=gigabytes * 10**9)
    config = fill(NodeConfig(), values(size, machine))
    table = memory_held(size, config, machine)
    assert vllm_sleeps(size, config, machine) == sleeps
    assert table.peak() <= 0.95 * machine.memory
    [vllm] = [part for part in table.parts if part.name == "vllm"]
    assert ("it sleeps in the update" in vllm.why) == sleeps and ("it stays awake" in vllm.why) != sleeps
    if not sleeps:
        rows = config.sampling.questions_per_round * config.sampling.completions
        assert answered_at_once(size, config, machine) >= rows > 64, "in one go"


def test_what_vllm_keeps_while_it_sleeps_is_not_there_for_training() -> None:
    size = model(2.6e9)._replace(kv_width=576)  # 41.6 GB to train all weights, of which half are to be free
    machine = GPU._replace(memory=84_000_000_000)
    assert "policy.lora.r" not in values(size, machine._replace(vllm=False))
    assert "policy.lora.r" in values(size, machine)


def values(
    size: ModelSize, machine: Machine, lora: int | None = None, *, thinks: bool = False, **says: Any
) -> dict[str, object]:
    choices = preset(asking(lora, **says), size, machine, thinks=thinks)
    return {key: choice.value for key, choice in choices.items()}


KIND, SHARE = "engine.kind", "engine.vllm.gpu_memory_utilization"
THOUGHTS, TEMPLATE = "engine.max_completion_length", "policy.template"
NO_THOUGHTS = {"enable_thinking": False}
QWEN = ModelSize(8_190_000_000, 36, 4096, 12288, 32, 1024, 151936, 40960)  # Qwen3-8B


@pytest.mark.parametrize(
    ("parameters", "gigabytes", "lora", "kind"),
    [
        (7e9, 24, None, "hf"),  # 15.4 GB of vLLM's weights beside 14 GB that are trained
        (7e9, 80, None, "vllm"),
        (3e9, 24, None, "vllm"),
        (4e9, 24, None, "vllm"),
        (4e9, 24, 0, "hf"),  # 64 GB to train all weights
        (14e9, 80, None, "vllm"),
        (20e9, 80, None, "hf"),  # 47 GB of vLLM's, and 40 GB of frozen weights
        (20e9, 141, None, "vllm"),
        (135e6, 8, None, "vllm"),
    ],
)
def test_vllm_generates_where_its_copy_of_the_weights_fits_beside_the_trainers(
    parameters: float, gigabytes: int, lora: int | None, kind: str
) -> None:
    machine = GPU._replace(memory=gigabytes << 30)
    assert values(model(parameters), machine, lora)[KIND] == kind
    assert KIND not in values(model(parameters), machine._replace(vllm=False), lora)
    assert KIND not in values(model(parameters), machine._replace(gpu=False), lora)


@given(sizes, machines.filter(lambda machine: machine.gpu))
def test_what_is_chosen_fits_while_it_generates_and_while_it_trains(size: ModelSize, machine: Machine) -> None:
    config = fill(NodeConfig(), values(size, machine))
    table = memory_held(size, config, machine)
    if config.engine.kind == "vllm":
        assert table.peak() <= machine.memory
        [vllm] = [part.bytes for part in table.parts if part.name == "vllm"]
        assert vllm > 2 * size.parameters, "its weights, and a cache"


def test_weights_of_16_bits_that_do_not_fit_have_4_where_bitsandbytes_is_installed() -> None:
    machine = GPU._replace(memory=12_000_000_000, vllm=False)
    assert values(QWEN, machine)["policy.dtype"] == "bfloat16"
    found = values(QWEN, machine._replace(nf4=True))
    assert (found["policy.dtype"], found["policy.lora.r"]) == ("nf4", 16)
    assert values(QWEN, machine._replace(nf4=True), 16)["policy.dtype"] == "nf4"
    assert values(QWEN, machine._replace(nf4=True, memory=24 << 30))["policy.dtype"] == "bfloat16"
    assert "policy.dtype" not in values(QWEN, machine._replace(nf4=True), 16, dtype="bfloat16")
    assert values(QWEN, machine._replace(nf4=True), engine={"kind": "vllm"})["policy.dtype"] == "bfloat16"


def test_cards_that_share_the_weights_out_train_more_of_them_and_never_4_bits() -> None:
    card = GPU._replace(memory=12_000_000_000, vllm=False, nf4=True)
    assert values(QWEN, card)["policy.dtype"] == "nf4"
    assert values(QWEN, card._replace(sharers=4))["policy.dtype"] == "bfloat16"
    assert "policy.lora.r" in values(model(3e9), GPU._replace(vllm=False))
    assert "policy.lora.r" not in values(model(3e9), GPU._replace(vllm=False, sharers=8))


@pytest.mark.parametrize("gigabytes", [24, 48, 80])
@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen3-8B"])
def test_adapters_that_a_person_asks_for_lie_over_weights_of_16_bits_and_fit(name: str, gigabytes: int) -> None:
    """They left the weights in float32: 31.8 GB of 24 for 4 B."""
    size, machine = MODELS[name], GPU._replace(memory=gigabytes * 10**9)
    config = fill(parse_config({"policy": {"lora": {"r": 16}}}), values(size, machine, 16))
    assert config.policy.dtype == "bfloat16"
    assert memory_held(size, config, machine).peak() <= machine.memory


def test_frozen_weights_are_as_the_machine_computes_and_as_a_person_says() -> None:
    turing = GPU._replace(bf16=False, memory=16 << 30)
    assert values(model(600e6), turing, 16)["policy.dtype"] == "float16"
    assert values(model(1.7e9), turing)["policy.dtype"] == "float16"
    assert values(model(600e6), SERVER, 16)["policy.dtype"] == "bfloat16"
    assert "policy.dtype" not in values(model(600e6), LAPTOP, 16), "its processor has no bfloat16, and there is room"
    assert values(model(3e9), LAPTOP, 16)["policy.dtype"] == "bfloat16", "there is none"
    assert "policy.dtype" not in values(model(600e6), GPU, 16, dtype="float32")
    assert "policy.dtype" not in values(model(600e6), GPU, 0)


@pytest.mark.parametrize("gigabytes", CARDS)
@pytest.mark.parametrize("name", MODELS)
def test_vllm_that_generates_ahead_fits_beside_the_update(name: str, gigabytes: int) -> None:
    """It is awake meanwhile. It was to have all that the trainer leaves while it sleeps: 84.6 of 80 GB for 0.6 B."""
    size, machine = MODELS[name], GPU._replace(memory=gigabytes * 10**9)
    config = fill(asking(engine={"ahead": 1}), values(size, machine, engine={"ahead": 1}))
    if config.engine.kind == "vllm":
        table = memory_held(size, config, machine)
        assert table.peak() <= machine.memory
        [vllm] = [part for part in table.parts if part.name == "vllm"]
        assert "update" in vllm.phases and vllm.bytes > 2 * size.parameters, "its weights, and a cache"
    turns = values(size, machine)[KIND]
    assert turns == "vllm" or config.engine.kind == "hf"


def test_transformers_that_generate_ahead_have_room_for_their_copy() -> None:
    size, machine = model(2.9e9), GPU._replace(memory=70_000_000_000, vllm=False)
    assert values(size, machine, 0, engine={"ahead": 0})["trainer.tokens_per_batch"] == 4096
    assert values(size, machine, 0, engine={"ahead": 1})["trainer.tokens_per_batch"] == 256


def test_on_a_card_without_bfloat16_transformers_generate_with_weights_in_float16() -> None:
    """On T4, V100 or RTX 20: vLLM was to compute in bfloat16 there, and refused."""
    found = preset(NodeConfig(), MODELS["Qwen2.5-1.5B"], Machine(15 * 10**9, gpu=True, bf16=False, vllm=True))
    assert (found[KIND].value, found["policy.dtype"].value) == ("hf", "float16")
    assert "has bfloat16" in found[KIND].reason
    assert values(model(135e6), GPU._replace(bf16=False))[KIND] == "hf"


def test_a_nucleus_that_vllm_has_no_probabilities_of_is_drawn_by_transformers() -> None:
    """The preset chose vLLM, which the configuration then refused."""
    asked = asking(engine={"top_p": 0.9})
    found = preset(asked, model(7e9), GPU)
    assert found[KIND].value == "hf" and "engine.top_p" in found[KIND].reason
    assert fill(asked, {key: choice.value for key, choice in found.items()}).engine.kind == "hf"


def test_weights_of_4_bits_that_a_person_asks_for_are_no_reason_for_vllm() -> None:
    assert values(model(7e9), GPU)[KIND] == "vllm"
    assert KIND not in values(model(7e9), GPU, 16, dtype="nf4")


def test_on_gpus_of_its_own_vllm_takes_nothing_of_the_trainers() -> None:
    apart = {"kind": "vllm", "placement": [1, 2]}
    found = values(model(7e9), GPU._replace(memory=24 << 30), engine=apart)
    assert found[SHARE] == 0.9


def test_where_vllm_does_not_fit_training_has_the_whole_gpu_and_the_reason_is_told() -> None:
    machine = GPU._replace(memory=24 << 30)
    found = preset(NodeConfig(), model(7e9), machine)
    others = {key: choice for key, choice in found.items() if key != KIND}
    assert others == preset(NodeConfig(), model(7e9), machine._replace(vllm=False))
    assert "no room beside training" in found[KIND].reason


def test_a_part_of_a_gpu_is_a_part_of_the_whole_of_it() -> None:
    """Two nodes on one GPU of 32 GiB want as much each as one on 16 GiB: half as large a part of the whole."""
    whole = values(model(3e9), GPU._replace(memory=16 << 30))
    half = values(model(3e9), GPU._replace(memory=16 << 30, share=0.5))
    assert half.pop(SHARE) == pytest.approx(whole.pop(SHARE) / 2, abs=0.001)
    assert whole == half


@pytest.mark.parametrize(
    ("size", "machine", "length"),
    [
        (model(1.7e9), GPU, 2048),
        (model(1.7e9, positions=2048), GPU, 1024),
        (model(1.7e9, positions=None), GPU, 1024),
        (model(1.7e9), GPU._replace(vllm=False), 2048),
        (QWEN, GPU, 2048),
        (model(1.7e9)._replace(kv_width=4096), GPU, 2048),  # 97 GB of cache at once, but vLLM takes turns
        (model(20e9)._replace(kv_width=2048), GPU._replace(vllm=False), 2048),  # and so does transformers: 4 of 12 GB
    ],
)
def test_a_reasoning_model_has_room_for_its_thoughts_where_the_memory_has(
    size: ModelSize, machine: Machine, length: int
) -> None:
    found = values(size, machine, thinks=True)
    assert found[THOUGHTS] == length
    assert TEMPLATE not in found
    assert TEMPLATE not in values(size, machine) and values(size, machine)[THOUGHTS] == 256


@pytest.mark.parametrize(
    ("size", "machine"),
    [
        (model(135e6), LAPTOP),
        (model(600e6), SERVER),
        (QWEN, GPU._replace(memory=24 << 30)),  # the update has no room for such a row
        (model(1.7e9)._replace(kv_width=768), GPU._replace(memory=24 << 30, vllm=False)),  # 13 of 64 at once
    ],
)
def test_elsewhere_it_is_asked_not_to_think(size: ModelSize, machine: Machine) -> None:
    found, plain = values(size, machine, thinks=True), values(size, machine)
    assert found == plain | {TEMPLATE: NO_THOUGHTS}


def thinking_model(folder: Path, template: str) -> str:
    write_tiny_policy(folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_a_reasoning_model_is_told_by_its_template_and_what_a_person_says_of_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.operations.presets.detect_machine", lambda *_, **__: LAPTOP)
    monkeypatch.setattr("node.operations.presets.measure_model", lambda _: model(135e6))
    thinks = thinking_model(tmp_path / "a", "{% if enable_thinking is false %}<think></think>{% endif %}")
    plain = thinking_model(tmp_path / "b", "{{ messages[0].content }}")

    def template(model: str, **says: object) -> object:
        choice = preset_for(parse_config({"policy": {"model": model, **says}})).get(TEMPLATE)
        return choice and choice.value

    assert (template(thinks), template(plain)) == (NO_THOUGHTS, None)
    assert template(thinks, template={"enable_thinking": True}) is None
    (tmp_path / "a" / "tokenizer.json").write_text("[]")
    assert template(thinks) is None, "that it is damaged is said when it is loaded"


@pytest.mark.parametrize("nodes", [1, 1000])
def test_nodes_on_one_machine_share_its_memory(nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.operations.presets.detect_machine", lambda *_, **__: LAPTOP)
    monkeypatch.setattr("node.operations.presets.measure_model", lambda _: model(135e6))
    config = parse_config({"policy": {"model": "any"}})
    assert ("policy.lora.r" in preset_for(config, nodes)) == (nodes > 1)


@pytest.mark.parametrize(("nodes", "on_one"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_nodes_on_several_gpus_share_the_one_that_they_are_on(
    nodes: int, on_one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.operations.presets.detect_machine", lambda *_, **__: GPU._replace(devices=4))
    monkeypatch.setattr("node.operations.presets.measure_model", lambda _: model(135e6))
    config = parse_config({"policy": {"model": "any"}})
    of_one = preset(NodeConfig(), model(135e6), GPU._replace(memory=GPU.memory // on_one, share=1 / on_one))
    assert preset_for(config, nodes) == of_one


def test_what_a_person_set_goes_before_a_preset_and_is_told_from_it() -> None:
    config = parse_config({"trainer": {"learning_rate": 5e-4}, "policy": {"lora": {"r": 0}}})
    filled = fill(config, {"trainer.learning_rate": 1e-5, "policy.lora.r": 16, "policy.lora.alpha": 32, "threads": 1})
    assert (filled.trainer.learning_rate, filled.policy.lora.r) == (5e-4, 0)
    assert (filled.policy.lora.alpha, filled.threads) == (32, 1)
    for one in (filled, pickle.loads(pickle.dumps(filled))):
        assert is_set(one, "trainer.learning_rate") and is_set(one, "policy.lora.r")
        assert not is_set(one, "policy.lora.alpha") and not is_set(one, "threads")
        assert parse_config(one.model_dump(exclude_unset=True)) == config


@pytest.mark.parametrize(
    ("rate", "trained", "warned"),
    [
        (5e-4, 24_000, False),
        (5e-4, SMALL, False),
        (5e-4, SMALL + 1, True),
        (1e-4, 10**9, False),
        (1.1e-4, 10**9, True),
    ],
)
def test_a_rate_that_would_destroy_a_model_is_warned_of(rate: float, trained: int, warned: bool) -> None:
    said = rate_warning(TrainerConfig(learning_rate=rate), trained)
    assert said.startswith(f"trainer.learning_rate={rate:g} over") if warned else said == ""


@pytest.mark.parametrize("lora", [0, 1])
def test_a_node_counts_the_weights_that_it_trains(lora: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_policy(tmp_path / "policy")
    monkeypatch.setattr("node.operations.presets.SMALL", 2000)  # of 4600; the adapters of rank 1 have fewer
    config = small_config(
        1,
        policy={"model": str(tmp_path / "policy"), "lora": {"r": lora}},
        network={"enabled": False},
        sampling={"external": 0},
    )
    with capture_logs() as logs:
        run_node(config, tmp_path / "state")
    assert any("destroys the model" in entry["event"] for entry in logs) == (not lora)


@pytest.mark.parametrize(
    ("name", "path"),
    [*((name, True) for name in ("./m", "/m", "~/m", "../m", "runs/models/m", "m/")), ("gpt2", False), ("a/b", False)],
)
def test_a_model_that_is_not_there_is_found_out_at_once(
    name: str, path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.chdir(tmp_path)

    def unreachable(model: str, **_: object) -> None:
        asked.append(model)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    assert looks_like_path(name) is path
    with pytest.raises(UserError, match="check the path" if path else r"not to be had from the model hub \(no route\)"):
        find_model(name)
    assert asked == ([] if path else [name])


def test_a_folder_is_a_model_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_policy(Path("gpt2"))
    find_model("gpt2")
    assert measure_model("gpt2").positions == 128


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "it has a config.json and no weights: copy the weights into it too"),
        ({"model-1-of-2.safetensors": b""}, "it has 1 of 2 files of weights, without model-2-of-2.safetensors"),
    ],
)
def test_a_folder_without_its_weights_is_found_out_before_torch_is_imported(
    files: dict[str, bytes], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the time of loading a model, and a line of transformers about file names."""
    write_tiny_policy(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=complaint):
        measure_model(str(tmp_path))


def test_the_page_on_gpus_has_the_table_of_what_is_chosen_today() -> None:
    assert "\n".join(table(vllm=True)) in (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize("gigabytes", CARDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_preset_that_does_not_fit_its_card_is_not_chosen_where_another_does(name: str, gigabytes: int) -> None:
    """By the preset's own sum, with vLLM and without: where either fits, so does what is chosen."""
    sums = [choice(MODELS[name], gigabytes, vllm=vllm)[1] for vllm in (True, False)]
    assert (min(sums) <= gigabytes * 10**9) == (max(sums) <= gigabytes * 10**9)
