"""What a node takes of memory, by the shape of its model; the slow tests hold it against a real node."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from node.cli import doctor
from node.cli.app import run
from node.config import parse_config
from node.engines import kind_of
from node.policy.detection import measure_model
from node.policy.memory import (
    CHUNK,
    LOGIT,
    Machine,
    MemoryPart,
    ModelSize,
    adapter_parameters,
    cache_width,
    footprint,
    logits_bytes,
    peak,
)
from tests.policies import tiny_policy
from tests.ranks import FSDP2

SMOLLM2 = ModelSize(134_515_008, 30, 576, 1536, 9, 192, 49152, 8192)


def parts_of(tree: dict[str, object], *, bf16: bool = False, gpu_memory: int = 0) -> list[MemoryPart]:
    config = parse_config(tree)
    width = cache_width(config, bf16=bf16)
    engine = kind_of(config.engine.kind).memory(SMOLLM2, config, width, gpu_memory)
    return footprint(SMOLLM2, config, engine, bf16=bf16, gpu_memory=gpu_memory)


def of(config: dict[str, object], *, bf16: bool = False, gpu_memory: int = 0) -> dict[str, int]:
    return {part.name: part.bytes for part in parts_of(config, bf16=bf16, gpu_memory=gpu_memory)}


@pytest.mark.parametrize("rank", [1, 4])
def test_adapters_are_counted_as_they_are_made(rank: int, tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path, lora=rank)
    trained = sum(weight.numel() for weight in policy.model.parameters() if weight.requires_grad)
    assert adapter_parameters(measure_model(str(tmp_path)), rank) == trained


def test_of_weights_that_are_shared_out_the_nodes_own_card_has_a_part_and_a_whole_copy() -> None:
    whole = {part.name: part for part in footprint(SMOLLM2, parse_config({}), [], bf16=False)}
    parts = {part.name: part for part in footprint(SMOLLM2, parse_config({}), [], bf16=False, sharers=4)}
    for name in ("weights", "gradients", "Adam"):
        assert 4 * parts[name].bytes == whole[name].bytes and "1/4 of them" in parts[name].why
    assert parts["whole weights"].bytes == whole["weights"].bytes
    assert parts["layers in work"].bytes < whole["weights"].bytes
    assert parts["activations"] == whole["activations"]


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
    assert of({}, bf16=True)["activations"] < full["activations"]
    assert "libraries" not in of({}, gpu_memory=1 << 30)
    on_gpu = of({"engine": {"kind": "vllm", "vllm": {"gpu_memory_utilization": 0.25}}}, gpu_memory=1 << 30)
    assert on_gpu["vllm"] == 1 << 28 and "key-value cache" not in on_gpu
    apart = of({"engine": {"kind": "vllm", "placement": [1]}}, gpu_memory=1 << 30)
    elsewhere = of({"engine": {"kind": "server", "placement": "http://box:8000"}}, gpu_memory=1 << 30)
    assert sum(apart.values()) == sum(elsewhere.values()) < sum(on_gpu.values())


def test_of_the_logits_there_is_a_chunk_at_a_time() -> None:
    """A micro-batch twice as large, or a vocabulary three times as large, has no more of them at once."""
    few, many = (of({"trainer": {"tokens_per_batch": tokens}})["logits"] for tokens in (2048, 4096))
    matrix = 4 * SMOLLM2.vocabulary * SMOLLM2.hidden
    assert few == many == LOGIT * CHUNK + matrix
    assert of({"policy": {"lora": {"r": 16}}})["logits"] == LOGIT * CHUNK
    assert of({"trainer": {"tokens_per_batch": 64}})["logits"] < few
    large = SMOLLM2._replace(vocabulary=3 * SMOLLM2.vocabulary)
    assert logits_bytes(large, 4096, adapters=True) == logits_bytes(SMOLLM2, 4096, adapters=True)


def test_generation_and_the_update_take_turns() -> None:
    parts = parts_of({"engine": {"max_prompt_length": 8000}})
    least = [part for part in parts if part.name not in ("gradients", "activations", "logits")]
    assert peak(parts) < sum(part.bytes for part in parts)
    assert peak(parts) >= sum(part.bytes for part in least)


@pytest.mark.parametrize(("gigabytes", "fits"), [(64, True), (1, False)])
def test_doctor_says_what_a_model_takes_and_what_to_set(
    gigabytes: int, fits: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("node.policy.detection.measure_model", lambda model: SMOLLM2)
    monkeypatch.setattr("node.policy.detection.detect_machine", lambda device="auto", **_: Machine(gigabytes << 30))
    monkeypatch.setattr(doctor, "examine", lambda port, folder: iter(()))
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
    monkeypatch.setattr(doctor, "examine", lambda port, folder: iter(()))
    assert run(["doctor", "--model", "a/model", "--json", *options], debug=False) == 0
    (found,) = (checks for title, checks in json.loads(capfd.readouterr().out)["checks"].items() if checks)
    return {check["name"]: check["text"] for check in found}


def test_doctor_sums_for_a_gpu_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = doctor_says(monkeypatch, capfd)
    there = doctor_says(monkeypatch, capfd, "--gpu", "24GB")
    assert {name.split()[0] for name in here} == {"model", "cpu", "disk"}
    assert {name.split()[0] for name in there} == {"model", "gpu", "disk"}
    assert "of 24.0 GB" in there["gpu together"]
    assert "of 25.8 GB" in doctor_says(monkeypatch, capfd, "--gpu", "24GiB")["gpu together"]


def test_doctor_sums_with_what_a_person_sets(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    as_is = doctor_says(monkeypatch, capfd)
    asked = doctor_says(monkeypatch, capfd, "--set", "policy.lora.r=16", "--set", "trainer.tokens_per_batch=512")
    assert "all weights" in as_is["cpu together"] and "adapters" in asked["cpu together"]
    assert asked["cpu activations"].endswith("512 tokens at once: trainer.tokens_per_batch")


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
