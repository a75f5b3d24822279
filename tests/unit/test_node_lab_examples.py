"""The experiments in examples/: an arm with a preset's name is that preset, and all arms share the bounds on peers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from node.config import NAMED_PRESETS, flatten, parse_config
from node.lab.plan import ArmConfig, Lab, Run, read_lab

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = ("max_surprise", "max_length_ratio", "max_signer_share")
FILES = [path.name for path in (ROOT / "examples").glob("*.toml") if "[arms." in path.read_text()]


def runs_by_arm(name: str, tmp_path: Path) -> tuple[Lab, dict[str, Run]]:
    lab = read_lab(ROOT / "examples" / name, tmp_path)
    return lab, {run.arm: run for run in reversed(lab.runs)}


def sampling_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    return parse_config(settings).sampling.model_dump()


def is_said(word: str, arm: str, config: ArmConfig) -> bool:
    return re.search(rf"\b({word})\b", f"{arm} {config.note}") is not None


@pytest.mark.parametrize("name", FILES)
def test_an_arm_that_bears_a_presets_name_is_that_preset_or_says_what_it_is_instead(name: str, tmp_path: Path) -> None:
    lab, runs = runs_by_arm(name, tmp_path)
    for arm, config in lab.config.arms.items():
        for preset, values in NAMED_PRESETS.items():
            if not is_said(preset, arm, config):
                continue
            settings = flatten(parse_config(runs[arm].settings).model_dump())
            differing = {key for key, value in values.items() if settings[key] != value}
            if is_said("bounded", arm, config):
                assert differing == {f"sampling.{bound}" for bound in BOUNDS}, (name, arm)
            elif is_said("self", arm, config):
                assert differing <= {f"sampling.{bound}" for bound in BOUNDS}, (name, arm)  # it has no peers to bound
            else:
                assert config.preset == preset, (name, arm)


@pytest.mark.parametrize("name", FILES)
def test_all_arms_share_the_files_bounds_but_for_those_with_a_bounded_twin(name: str, tmp_path: Path) -> None:
    lab, runs = runs_by_arm(name, tmp_path)
    sampling = {arm: sampling_of(run.settings) for arm, run in runs.items()}
    usual = {bound: sampling_of(lab.config.settings)[bound] for bound in BOUNDS}
    for arm, values in sampling.items():
        if values != values | usual:
            assert lab.config.arms[arm].preset or is_said("unbounded|bounds on", arm, lab.config.arms[arm]), (name, arm)
            assert any(other == values | usual for other in sampling.values()), (name, arm)
