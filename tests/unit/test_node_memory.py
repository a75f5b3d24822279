"""What a node takes of memory, by the shape of its model; the slow tests hold it against a real node."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from node.cli import doctor
from node.cli.app import run
from node.config import NodeConfig, fill, merge, parse_config
from node.engines.missing import check_split
from node.errors import UserError
from node.operations.presets import SMALL, preset
from node.policy.detection import measure_model
from node.policy.memory import (
    CHUNK,
    LOGIT,
    PHASES,
    SPARE,
    Machine,
    MemoryPart,
    ModelSize,
    adapter_parameters,
    cards_of,
    logits_at_once,
    logits_bytes,
    memory_held,
    vllm_sleeps,
)
from tests.policies import tiny_policy
from tests.ranks import FSDP2

CPU, BF16 = Machine(0), Machine(0, bf16=True)
GPU = Machine(1 << 30, gpu=True)
SMOLLM2 = ModelSize(134_515_008, 30, 576, 1536, 9, 192, 49152, 8192)


def parts_of(tree: dict[str, object], machine: Machine = CPU) -> list[MemoryPart]:
    return memory_held(SMOLLM2, parse_config(tree), machine).parts


def of(tree: dict[str, object], machine: Machine = CPU) -> dict[str, int]:
    return {part.name: part.bytes for part in parts_of(tree, machine)}


@pytest.mark.parametrize("rank", [1, 4])
def test_adapters_are_counted_as_they_are_made(rank: int, tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path, lora=rank)
    trained = sum(weight.numel() for weight in policy.model.parameters() if weight.requires_grad)
    assert adapter_parameters(measure_model(str(tmp_path)), rank) == trained


def test_of_weights_that_are_shared_out_the_nodes_own_card_has_a_part_and_a_whole_copy() -> None:
    whole, parts = ({part.name: part for part in parts_of({}, GPU._replace(sharers=sharers))} for sharers in (1, 4))
    for name in ("weights", "gradients", "Adam"):
        assert 4 * parts[name].bytes == whole[name].bytes and "1/4 of them" in parts[name].why
    assert parts["whole weights"].bytes == whole["weights"].bytes
    assert parts["layers in work"].bytes < whole["weights"].bytes
    assert parts["activations"] == whole["activations"]


@pytest.mark.slow
def test_doctor_sums_for_accelerates_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_policy(tmp_path)
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    asked = ["doctor", "--model", str(tmp_path), "--gpu", "8GB", "--accelerate-config"]
    run([*asked, str(tmp_path / "fsdp2.yaml")], debug=False)
    assert "1/4 of them" in capsys.readouterr().out
    run([*asked, str(tmp_path / "fsdp2.yaml"), "--processes", "2"], debug=False)
    assert "1/2 of them" in capsys.readouterr().out
    assert run([*asked, str(tmp_path / "none.yaml")], debug=False) == 2
    assert "there is no file" in capsys.readouterr().err


def test_what_each_setting_saves() -> None:
    full = of({})
    adapters = of({"policy": {"lora": {"r": 16}}})
    assert full["Adam"] == 8 * SMOLLM2.parameters == 2 * full["gradients"]
    assert adapters["Adam"] < full["Adam"] / 20 and adapters["weights"] == full["weights"]
    assert 2 * of({"policy": {"dtype": "bfloat16", "lora": {"r": 16}}})["weights"] == full["weights"]
    packed = of({"policy": {"dtype": "nf4", "lora": {"r": 16}}})
    assert 2 * SMOLLM2.vocabulary * SMOLLM2.hidden < packed["weights"] < 0.42 * adapters["weights"] / 2
    small = of({"trainer": {"trl": {"optim": "adamw_8bit"}}})
    assert small["Adam"] < 0.26 * full["Adam"] and small["gradients"] == full["gradients"]
    half = of({"trainer": {"tokens_per_batch": 512}})
    assert of({"trainer": {"tokens_per_batch": 1024}})["activations"] == 2 * half["activations"]
    assert of({"trainer": {"gradient_checkpointing": True}})["activations"] < full["activations"] / 5
    assert of({}, BF16)["activations"] < full["activations"]
    assert {part.device for part in parts_of({}, GPU) if part.name == "libraries"} == {"main"}
    on_gpu = of({"engine": {"kind": "vllm", "vllm": {"gpu_memory_utilization": 0.25}}}, GPU)
    assert on_gpu["vllm"] == 1 << 28 and "key-value cache" not in on_gpu
    places = ({"kind": "vllm"}, {"kind": "vllm", "placement": [1]}, {"kind": "server", "placement": "http://box:8000"})
    shared, apart, elsewhere = (memory_held(SMOLLM2, parse_config({"engine": place}), GPU) for place in places)
    assert apart.peak() == elsewhere.peak() < shared.peak()
    assert apart.peak("engine") == int(0.4 * GPU.memory) and elsewhere.peak("engine") == 0


def test_a_model_that_was_published_quantised_is_counted_as_its_files_are(tmp_path: Path) -> None:
    """It was counted at 2 or 4 bytes a weight, and refused where it fits."""
    tiny_policy(tmp_path)
    plain = measure_model(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 5000)
    size = measure_model(str(tmp_path))
    assert (plain.quantised, size) == (0, plain._replace(quantised=5000))
    table = memory_held(size, parse_config({"policy": {"lora": {"r": 4}}}), GPU)
    assert {part.bytes for part in table.parts if part.name == "weights"} == {5000}


def test_a_quantised_model_is_trained_by_adapters_alone() -> None:
    size = SMOLLM2._replace(quantised=SMOLLM2.parameters)
    chosen = [preset(NodeConfig(), model, Machine(80 << 30, gpu=True, nf4=True)) for model in (SMOLLM2, size)]
    assert ["policy.lora.r" in choices for choices in chosen] == [False, True]
    assert chosen[1]["policy.dtype"].value != "nf4"


def test_of_the_logits_there_is_a_chunk_at_a_time() -> None:
    """A micro-batch twice as large, or a vocabulary three times as large, has no more of them at once."""
    few, many = (of({"trainer": {"tokens_per_batch": tokens}})["logits"] for tokens in (2048, 4096))
    matrix = 4 * SMOLLM2.vocabulary * SMOLLM2.hidden
    assert few == many == LOGIT * CHUNK + matrix
    assert of({"policy": {"lora": {"r": 16}}})["logits"] == LOGIT * CHUNK
    assert of({"trainer": {"tokens_per_batch": 64}})["logits"] < few
    large = SMOLLM2._replace(vocabulary=3 * SMOLLM2.vocabulary)
    assert logits_bytes(large, 4096, CHUNK, adapters=True) == logits_bytes(SMOLLM2, 4096, CHUNK, adapters=True)


@pytest.mark.parametrize(
    ("gigabytes", "power"), [(0, 24), (8, 24), (16, 24), (24, 25), (48, 26), (80, 26), (85, 27), (141, 27)]
)
def test_a_large_gpu_has_larger_chunks_of_logits(gigabytes: int, power: int) -> None:
    assert logits_at_once(gigabytes * 10**9) == 1 << power
    table = memory_held(SMOLLM2, parse_config({}), Machine(gigabytes * 10**9, gpu=gigabytes > 0))
    [logits] = [part for part in table.parts if part.name == "logits"]
    assert f"{2**power / 1e6:.0f} M at once" in logits.why


QWEN = ModelSize(8_190_735_360, 36, 4096, 12_288, 32, 1024, 151_936, 40_960, 8)  # 21 GB in vLLM


@pytest.mark.parametrize(
    ("gigabytes", "devices", "engines"),
    [
        (48, [], [[]]),
        (24, [1], [[1]]),
        (48, [0, 1], [[0], [1]]),
        (48, [1, 2, 3], [[1], [2], [3]]),
        (24, [1, 2, 3, 4], [[1, 2], [3, 4]]),  # one would have no room for a cache
        (24, [1, 2, 3], [[1, 2, 3]]),  # which is refused: three do not divide 32 heads
        (8, [1, 2, 3, 4], [[1, 2, 3, 4]]),
        (0, [1, 2], [[1], [2]]),
    ],
)
def test_an_engine_has_as_few_cards_as_hold_the_model(
    gigabytes: int, devices: list[int], engines: list[list[int]]
) -> None:
    engine = {"kind": "vllm", "placement": devices, "vllm": {"gpu_memory_utilization": 0.9}}
    config, machine = parse_config({"engine": engine}), Machine(gigabytes * 10**9, gpu=gigabytes > 0)
    assert cards_of(QWEN, config.engine, machine) == engines
    refused = pytest.raises(UserError, match=r"names 3 GPUs for a model that does not fit one.*name 2 of them")
    with refused if len(engines[0]) == 3 else nullcontext():
        check_split(QWEN, config.engine, machine)


def test_engines_are_counted_by_the_device_that_they_are_on() -> None:
    """Without a GPU all of them are in main memory, and on the trainer's GPU the engine there takes turns with it."""
    apart, beside, both = (
        memory_held(SMOLLM2, parse_config({"engine": {"kind": "vllm", "placement": devices}}), GPU)
        for devices in ([1], [0], [0, 1])
    )
    assert both.total("generate") == beside.total("generate") > apart.total("generate")
    assert both.total("update") == beside.total("update")
    assert both.peak("engine") == apart.peak("engine") > beside.peak("engine") == 0
    first, two = (of({"engine": {"kind": "vllm", "placement": devices}}, CPU)["vllm"] for devices in ([1], [1, 2]))
    assert two == 2 * first


def test_generation_and_the_update_take_turns() -> None:
    many = {"sampling": {"completions": 128, "local": 64}}
    table = memory_held(SMOLLM2, parse_config(many), CPU)
    cache = of(many)["key-value cache"]
    together = sum(part.bytes if part.bound else 1.1 * part.bytes for part in table.parts)
    assert table.peak() == table.total("generate") < together
    assert table.total("generate") - table.total("hand over") == pytest.approx(1.1 * cache)


@pytest.mark.parametrize(("gigabytes", "fits"), [(64, True), (1, False)])
def test_doctor_says_what_a_model_takes_and_what_to_set(
    gigabytes: int, fits: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("node.policy.detection.measure_model", lambda model: SMOLLM2)
    monkeypatch.setattr("node.policy.detection.detect_machine", lambda device="auto", **_: Machine(gigabytes << 30))
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(()))
    # Whole checkpoints of 1.6 GB each: one, another while it is written, and weights alone; of adapters it is little.
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3.9e9 if fits else 6e7))
    assert run(["doctor", "--model", "a/model"], debug=False) == 0
    lines = capfd.readouterr().out.splitlines()
    on_cpu, on_disk = (line for line in lines if "together" in line)
    assert {on_cpu[0], on_disk[0]} == {"✓" if fits else "!"}
    said = "\n".join(lines)
    assert ("choose a smaller model" in said) == ("trainer.trl.save_total_limit=1" in said) == (not fits)
    assert any("trainer.learning_rate=" in line and "# " in line for line in lines)
    assert any("weights" in line and "135 M of" in line for line in lines)


def doctor_says(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """Return what `gossamer doctor --model` finds of the model, by name, on a machine without a GPU."""
    monkeypatch.setattr("node.policy.detection.measure_model", lambda model: SMOLLM2)
    monkeypatch.setattr("node.policy.detection.detect_machine", lambda device="auto", **_: Machine(16 << 30))
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(()))
    assert run(["doctor", "--model", "a/model", "--json", *options], debug=False) == 0
    (found,) = (checks for title, checks in json.loads(capfd.readouterr().out)["checks"].items() if checks)
    return {check["name"]: check["text"] for check in found}


def test_doctor_sums_for_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = doctor_says(monkeypatch, capfd)
    there = doctor_says(monkeypatch, capfd, "--gpu", "24GB")
    assert {name.split()[0] for name in here} == {"model", "cpu", "disk"}
    assert {name.split()[0] for name in there} == {"model", "gpu", "main", "disk"}
    assert "of 24.0 GB" in there["gpu together"]
    assert "of 25.8 GB" in doctor_says(monkeypatch, capfd, "--gpu", "24GiB")["gpu together"]


def test_doctor_sums_with_what_a_person_sets(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    as_is = doctor_says(monkeypatch, capfd)
    asked = doctor_says(monkeypatch, capfd, "--set", "policy.lora.r=16", "--set", "trainer.tokens_per_batch=600")
    assert "all weights" in as_is["cpu together"] and "adapters" in asked["cpu together"]
    assert asked["cpu activations"].endswith("600 tokens at once: trainer.tokens_per_batch, or a row")


def test_a_row_longer_than_a_micro_batch_is_counted_whole() -> None:
    """The trainer divides no row. The table said 2048 tokens, and the update took 7168."""
    lengths = {"max_prompt_length": 3072, "max_completion_length": 4096}
    long, short = (of({"engine": lengths, "trainer": {"tokens_per_batch": tokens}}) for tokens in (2048, 7168))
    assert long["activations"] == short["activations"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu", "24GB"], "name the model with --model"),
        (["--set", "policy.lora.r=16"], "name the model with --model"),
        (["--model", "builtin", "--gpu", "large"], "such as 24GB, got 'large'"),
        (["--model", "builtin", "--gpu", "0"], "such as 24GB, got '0'"),
        (["--model", "builtin", "--set", "policy.lora.rank=16"], "policy.lora.rank"),
    ],
)
def test_what_doctor_cannot_sum_is_refused_in_a_line(
    options: list[str], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", *options], debug=False) == 2
    said = capfd.readouterr().err
    assert complaint in said and said.count("\n") == 1


MODELS = st.builds(
    lambda layers, heads, widths, words: ModelSize(
        layers * 64 * heads * widths * 64 * heads * 4 + words * 64 * heads,
        layers,
        64 * heads,
        64 * heads * widths,
        heads,
        64 * max(1, heads // 4),
        words,
        8192,
    ),
    st.integers(2, 80),
    st.integers(1, 64),
    st.integers(1, 5),
    st.integers(99, 262_144),
)
MACHINES = st.builds(
    Machine,
    st.integers(1 << 30, 1 << 38),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 0.5, 0.25]),
    nf4=st.booleans(),
    sharers=st.sampled_from([1, 1, 2, 8]),
)
SETTINGS = st.fixed_dictionaries(
    {
        "policy": st.sampled_from([{}, *({"lora": {"r": 16}, "dtype": width} for width in ("float32", "bfloat16"))]),
        "engine": st.fixed_dictionaries(
            {"kind": st.sampled_from(["hf", "vllm"]), "ahead": st.integers(0, 1)},
            optional={"max_completion_length": st.integers(1, 4096), "vllm": st.just({"gpu_memory_utilization": 0.3})},
        ),
        "sampling": st.fixed_dictionaries({"local": st.integers(0, 64), "external": st.integers(1, 64)}),
        "trainer": st.fixed_dictionaries(
            {"tokens_per_batch": st.integers(1, 1 << 16), "gradient_checkpointing": st.booleans()},
            optional={"trl": st.just({"optim": "adamw_8bit"}), "bf16": st.booleans()},
        ),
    }
)


def changed(tree: dict[str, Any], **tables: object) -> NodeConfig:
    return parse_config(merge(tree, tables))


@given(MODELS, MACHINES, SETTINGS)
def test_what_is_to_take_less_memory_takes_less_in_no_phase_more(
    size: ModelSize, machine: Machine, tree: dict[str, Any]
) -> None:
    held = memory_held(size, parse_config(tree), machine)
    adapters = {"lora": {"r": 1}}
    lesser = {
        "a smaller micro-batch": (changed(tree, trainer={"tokens_per_batch": 1}), machine),
        "checkpointing": (changed(tree, trainer={"gradient_checkpointing": True}), machine),
        "in turns": (changed(tree, engine={"ahead": 0}), machine),
        "elsewhere": (changed(tree, engine={"kind": "server", "placement": ["http://box:8000"]}), machine),
        "moments of 8 bits": (changed(tree, trainer={"trl": {"optim": "adamw_8bit"}}), machine),
        **({"adapters": (changed(tree, policy=adapters), machine)} if "lora" not in tree["policy"] else {}),
        **({"more cards": (parse_config(tree), machine._replace(sharers=16))} if machine.sharers > 1 else {}),
    }
    for name, (config, there) in lesser.items():
        less = memory_held(size, config, there)
        is_woken = vllm_sleeps(size, parse_config(tree), machine) and not vllm_sleeps(size, config, there)
        if is_woken and config.engine.kind == "vllm":
            assert less.peak() <= (1 - SPARE) * machine.memory, "vLLM stays awake, as both fit now"
            continue
        for phase in PHASES[:3]:
            assert less.total(phase) <= held.total(phase), (name, phase)
        if name != "in turns":  # vLLM that is awake may shrink to less than it keeps asleep, by this sum
            assert less.least <= held.least, name


@given(MODELS, MACHINES, SETTINGS)
def test_vllm_sleeps_in_the_update_only_if_both_do_not_fit(
    size: ModelSize, machine: Machine, tree: dict[str, Any]
) -> None:
    """It slept in each round of a node whose update left it all that it had."""
    machine = machine._replace(gpu=True, memory=max(machine.memory, 8 << 30))
    config = {"kind": "vllm", "vllm": {"gpu_memory_utilization": 0.3}}
    turns, awake = (
        memory_held(size, changed(tree, engine={**config, "ahead": ahead}), machine._replace(share=1))
        for ahead in (0, 1)
    )
    if awake.peak() <= (1 - SPARE) * machine.memory:
        assert [turns.total(phase) for phase in PHASES] == [awake.total(phase) for phase in PHASES]
    else:
        assert turns.total("update") < awake.total("update")
        assert turns.total("generate") == awake.total("generate")


@example(  # a larger round took more of transformers' cache than had room
    ModelSize(94_914_944, 5, 2176, 2176, 34, 512, 99, 8192, 1),
    Machine(1 << 30, gpu=True, bf16=True, share=0.25, sharers=2),
    19.0,
)
@given(MODELS, MACHINES, st.floats(2, 32))
def test_the_preset_fits_by_the_same_sum_wherever_something_fits(
    size: ModelSize, machine: Machine, of_a_weight: float
) -> None:
    """Adapters over 16 bits with the smallest micro-batch, generated by transformers, are among what is tried."""
    machine = machine._replace(memory=int(of_a_weight * size.parameters) + (1 << 30))  # neither plenty nor hopeless
    choices = {key: choice.value for key, choice in preset(NodeConfig(), size, machine).items()}
    room = memory_held(size, fill(NodeConfig(), choices), machine).peak() <= machine.memory
    if size.parameters > SMALL:
        width = {"policy.dtype": "float16" if machine.gpu and not machine.bf16 else "bfloat16"}
        least = {"policy.lora.r": 32, "engine.kind": "hf", "trainer.tokens_per_batch": 256} | width
        fits = memory_held(size, fill(NodeConfig(), choices | least), machine).peak() <= 0.8 * machine.memory
        assert room or not fits
