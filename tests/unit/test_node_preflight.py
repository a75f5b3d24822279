"""What would end a node anyway is told at once: before torch is imported, and before a model is loaded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from node.cli.running import run
from node.config import NodeConfig, parse_config
from node.errors import UserError
from node.operations.preflight import check_first
from node.operations.presets import check_model, notes_on_model
from node.policy.memory import Machine, ModelSize
from tests.ranks import FSDP2


def config_of(**tables: object) -> NodeConfig:
    return parse_config(tables)


EIGHT = ModelSize(8_000_000_000, 36, 4096, 12_288, 32, 1024, 128_256, 8192)
SMALL = EIGHT._replace(parameters=135_000_000)
CARD, BOX = Machine(80_000_000_000, gpu=True, bf16=True), Machine(80_000_000_000)


def model_folder(folder: Path, *, weights: bool = False) -> Path:
    """A folder as a model's."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if weights:
        (folder / "model.safetensors").touch()
    return folder


def here_is(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Have every model of any name 8 G weights, and this machine be `machine`."""
    monkeypatch.setattr("node.operations.presets.measure_model", lambda name: EIGHT)
    monkeypatch.setattr("node.operations.presets.detect_machine", lambda device, **_: machine)


@pytest.mark.slow
def test_what_is_missing_is_told_without_importing_torch(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        cases = {
            "has no GPU": ["--set", "policy.device=cuda"],
            "has no vLLM": ["--set", "engine.kind=vllm", "--set", f"engine.vllm.python={sys.executable}"],
            "cannot run engine.vllm.python": ["--set", "engine.kind=vllm", "--set", "engine.vllm.python=/no/such"],
            "no server of engine.placement answers: http://127.0.0.1:9 (": [
                *("--set", "engine.kind=server"),
                *("--set", "engine.placement=http://127.0.0.1:9"),
            ],
            "config.json and no weights": ["--model", str(model_folder(tmp_path / "empty"))],
            "no such folder": ["--model", "./no-such-folder"],
            f"cannot listen on 127.0.0.1:{port}": ["--set", f"observe.port={port}"],
            "is in use: choose another port": ["--listen", f"tcp://127.0.0.1:{port}"],
        }
        code = (
            "import json, sys\nfrom node.cli.app import run\n"
            "for case in json.loads(sys.argv[1]):\n"
            " assert run(['node', '--state', sys.argv[2], '--model', 'builtin', *case], debug=False) == 2\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(list(cases.values())), str(tmp_path / "node")],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for expected, line in zip(cases, lines, strict=True):
        assert expected in line
    assert not (tmp_path / "node").exists()


def test_a_full_disk_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=1e9, free=1_000_000))
    with pytest.raises(UserError, match=r"the disk that holds .*new/node is full \(1 MB are free\): free some space"):
        check_first(config_of(), tmp_path / "new" / "node")


def test_missing_parts_of_a_model_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "parts", weights=True)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"1 of 2 files of weights, without model-00002-of-00002\.safetensors"):
        check_first(config_of(policy={"model": str(folder)}), tmp_path)


def test_without_bitsandbytes_what_needs_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(policy={"dtype": "nf4", "lora": {"r": 4}}, trainer={"trl": {"optim": "adamw_8bit"}})
    monkeypatch.setattr("node.policy.detection.has_bitsandbytes", lambda: True)
    check_first(config, tmp_path)
    monkeypatch.setattr("node.policy.detection.has_bitsandbytes", lambda: False)
    line = r"for policy\.dtype='nf4' and trainer\.trl\.optim='adamw_8bit': .* -m pip install"
    with pytest.raises(UserError, match=line):
        check_first(config, tmp_path)


def test_a_tracker_that_is_not_here_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(trainer={"trl": {"report_to": ["tensorboard", "wandb", "trackio"]}})
    here = {"tensorboardX", "wandb"}
    monkeypatch.setattr("node.policy.detection.find_spec", lambda name: True if name in here else None)
    with pytest.raises(UserError, match=r"report_to: trackio not installed: .* -m pip install 'gossamer\[trackio\]'"):
        check_first(config, tmp_path)
    here.add("trackio")
    check_first(config, tmp_path)


def test_a_model_that_is_far_too_large_is_told_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    here_is(monkeypatch, CARD)
    with pytest.raises(UserError, match=r"8 G weights, which take 128 GB .* the GPU has 80 GB: set policy\.lora\.r=16"):
        check_model(config_of(policy={"model": "a/model"}))
    for dtype in ("bfloat16", "float16"):
        check_model(config_of(policy={"model": "a/model", "dtype": dtype, "lora": {"r": 16}}))
    here_is(monkeypatch, Machine(16_000_000_000))
    with pytest.raises(UserError, match="this machine has 16 GB"):
        check_model(config_of(policy={"model": "a/model", "device": "cpu"}))


def test_a_dry_run_refuses_a_model_that_is_far_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    here_is(monkeypatch, CARD)
    with pytest.raises(UserError, match="take 128 GB"):
        notes_on_model(config_of(policy={"model": "a/model"}))
    assert notes_on_model(config_of(policy={"model": "a/model"}, trainer={"learning_rate": 1e-6}), sharers=4) == []


@pytest.mark.slow
def test_a_model_that_cards_share_out_need_not_fit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here_is(monkeypatch, CARD)
    monkeypatch.setattr("node.cli.running.check_first", lambda *_: None)
    config = config_of(policy={"model": "a/model"})
    (tmp_path / "fsdp2.yaml").write_text(FSDP2)
    trained = []
    monkeypatch.setattr("node.run.run_node", lambda *_, **more: trained.append(more))
    with pytest.raises(UserError, match="take 128 GB"):
        run(config, tmp_path / "node")
    run(config, tmp_path / "node", accelerate=tmp_path / "fsdp2.yaml")
    assert len(trained) == 1
    with pytest.raises(UserError, match=r"take 96 GB .*; the GPU has 80 GB: set policy\.lora\.r=16 "):
        run(config, tmp_path / "node", accelerate=tmp_path / "fsdp2.yaml", processes=2)
    run(config_of(policy={"model": config.policy.model, "lora": {"r": 16}, "dtype": "bfloat16"}), tmp_path / "node")
    assert len(trained) == 2


def test_on_a_processor_all_parts_are_in_one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    here_is(monkeypatch, BOX)
    with pytest.raises(UserError, match=r"take 128 GB .* this machine has 80 GB"):
        check_model(config_of(policy={"model": "a/model", "device": "cpu"}), sharers=4)


@pytest.mark.parametrize(
    ("gigabytes", "policy", "remedy"),
    [
        (24, {}, 'set policy.lora.r=16 and policy.dtype="bfloat16", or choose'),
        (24, {"lora": {"r": 16}}, 'set policy.dtype="bfloat16", or choose'),
        (12, {}, 'set policy.lora.r=16 and policy.dtype="nf4", or choose'),
        (12, {"lora": {"r": 16}, "dtype": "bfloat16"}, 'set policy.dtype="nf4", or choose'),
        (4, {}, "has 4 GB: choose a smaller model"),
    ],
)
def test_what_is_advised_passes_the_same_sum(
    gigabytes: int, policy: dict[str, object], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here_is(monkeypatch, CARD._replace(memory=gigabytes * 10**9, nf4=True))
    with pytest.raises(UserError) as refused:
        check_model(config_of(policy=policy | {"model": "a/model"}))
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    ("heads", "keys", "cards", "fewer"), [(16, 8, 3, 2), (14, 2, 4, 2), (12, 2, 3, 2), (9, 3, 6, 3), (16, 8, 12, 8)]
)
def test_cards_that_do_not_divide_the_heads_are_refused_before_the_model_is_loaded(
    heads: int, keys: int, cards: int, fewer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here_is(monkeypatch, CARD)
    size = SMALL._replace(heads=heads, kv_heads=keys)
    monkeypatch.setattr("node.operations.presets.measure_model", lambda name: size)

    def on(count: int, part: float = 0.03) -> NodeConfig:
        """Return a configuration whose cards hold the model together, if at all: of each, vLLM has hardly anything."""
        engine = {"kind": "vllm", "placement": list(range(count)), "vllm": {"gpu_memory_utilization": part}}
        return config_of(policy={"model": "a/model"}, engine=engine)

    assert check_model(on(cards, part=0.9)) == size, "an engine on each card"
    with pytest.raises(UserError, match=rf"names {cards} GPUs .* {heads} attention heads .*: name {fewer} of them"):
        check_model(on(cards))
    assert check_model(on(fewer)) == size
