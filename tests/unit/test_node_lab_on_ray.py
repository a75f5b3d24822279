"""A run as a task of a cluster: its files travel, its records come back, and it asks for what it needs. Without Ray."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

from node.cli.app import run as command
from node.errors import UserError
from node.fleet import ray_cluster
from node.fleet.ray_cluster import packed, packed_files, relocated, unpack, unpack_files
from node.lab import on_ray
from node.lab.on_ray import Needs, keep_records, needs_of
from node.lab.plan import Run, RunPart


def a_run(folder: Path, **settings: object) -> Run:
    return Run("", "alone", 1, 2, 0, {"rounds": 2, **settings}, folder / "alone" / "seed1")


def test_the_files_that_settings_name_travel_and_are_found_where_they_are_unpacked(tmp_path: Path) -> None:
    model, rows, rewards = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "rewards.py"
    (model / "deep").mkdir(parents=True)
    (model / "deep" / "weights").write_bytes(b"w" * 1000)
    rows.write_text("{}\n")
    rewards.write_text("def kind(): ...\n")
    tasks = [{"name": "rewards/rows", "options": {"path": str(rows), "functions": [f"{rewards}:kind", "trl:other"]}}]
    engine = {"vllm": {"python": sys.executable}}  # each machine has its own
    run = a_run(tmp_path, policy={"model": str(model)}, tasks=tasks, engine=engine, note="/no/such/path")
    files = packed_files([run.settings], "a run")
    assert sorted(files) == sorted([str(model), str(rows), str(rewards)])
    places = unpack_files(files, tmp_path / "there")
    moved = relocated(run.settings, places)
    assert (Path(moved["policy"]["model"]) / "deep" / "weights").read_bytes() == b"w" * 1000
    assert Path(moved["tasks"][0]["options"]["path"]).read_text() == "{}\n"
    assert moved["tasks"][0]["options"]["functions"] == [f"{places[str(rewards)]}:kind", "trl:other"]
    assert (moved["note"], moved["rounds"], moved["engine"]) == ("/no/such/path", 2, engine)


def test_files_too_large_to_travel_are_told_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"w" * 1000)
    monkeypatch.setattr(ray_cluster, "MOST_SHIPPED", 999)
    with pytest.raises(UserError, match="name the model by its id on the hub"):
        packed_files([{"policy": {"model": str(tmp_path / "model")}}], "a run")


def test_records_come_into_the_runs_folder_with_its_own_settings_and_without_keys(tmp_path: Path) -> None:
    there = tmp_path / "there"
    (there / "seed1" / "nodes" / "n0").mkdir(parents=True)
    (there / "seed1" / "summary.json").write_text("{}")
    (there / "seed1" / "nodes" / "n0" / "identity.key").write_text("secret")
    (there / "seed1" / "nodes" / "n0" / "metrics.jsonl").write_text("{}\n")
    (there / "seed1.json").write_text('{"of": "another machine"}')
    (there / "seed1.log").write_text("said\n")
    run = a_run(tmp_path / "here")
    run.folder.mkdir(parents=True)
    (run.folder / "left by a run that was cut off").touch()
    keep_records(run, packed(there, on_ray.RECORDS))
    found = sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file())
    assert found == ["nodes/n0/metrics.jsonl", "summary.json"]
    assert run.folder.with_suffix(".log").read_text() == "said\n"
    assert '"rounds": 2' in run.folder.with_suffix(".json").read_text()
    assert sorted(path.name for path in run.folder.parent.iterdir()) == ["seed1", "seed1.json", "seed1.log"]


def test_a_run_that_fits_no_single_machine_of_a_mixed_cluster_is_refused_and_does_not_wait_for_ever() -> None:
    machines = [{"CPU": 64.0, "memory": 64e9}, {"CPU": 8.0, "GPU": 2.0, "memory": 8e9}]
    with pytest.raises(UserError, match="no machine of the cluster has both"):
        on_ray._fitted(Needs(2, 1, 16_000_000_000), machines, "alone")
    assert on_ray._fitted(Needs(16, 4, 4_000_000_000), machines, "alone") == Needs(8, 2, 4_000_000_000)
    assert on_ray._fitted(Needs(16, 0, 4_000_000_000), machines, "alone") == Needs(16, 0, 4_000_000_000)


def test_nothing_in_an_archive_gets_outside_of_its_folder_or_grows_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        entry = tarfile.TarInfo("../outside")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(data.getvalue(), tmp_path / "in")
    assert not (tmp_path / "outside").exists()
    (tmp_path / "file.json").write_bytes(b" " * 1000)
    monkeypatch.setattr(ray_cluster, "MOST_RECORDS", 999)
    with pytest.raises(UserError, match="more than 0 MiB of records"):
        unpack(packed(tmp_path / "file.json"), tmp_path / "in")


def test_a_run_asks_for_what_its_nodes_need(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    one, two = needs_of("memory", run), needs_of("processes", run)
    assert (one.num_cpus, one.num_gpus, two.num_cpus, two.num_gpus) == (1, 0, 2, 0)
    assert 100e6 < one.memory < two.memory == 2 * one.memory
    parts = (RunPart("small", 1, run.settings), RunPart("large", 2, run.settings))
    assert needs_of("processes", run._replace(nodes=3, parts=parts)).memory == 3 * one.memory


def test_a_run_that_no_machine_of_the_cluster_can_do_is_told_and_not_waited_for() -> None:
    machines = [{"CPU": 2.0, "memory": 4e9}, {"CPU": 8.0, "memory": 2e9}]
    assert on_ray._fitted(Needs(4, 0, 3_000_000_000), machines, "a run") == Needs(2, 0, 3_000_000_000)
    assert on_ray._fitted(Needs(16, 0, 1), machines, "a run").num_cpus == 8  # they share the cores
    with pytest.raises(UserError, match=r"takes some 5\.0 GB, and the largest machine of the cluster has 4\.0"):
        on_ray._fitted(Needs(1, 0, 5_000_000_000), machines, "a run")
    with pytest.raises(UserError, match="wants a GPU"):
        on_ray._fitted(Needs(1, 1, 1), machines, "a run")


def test_another_place_than_ray_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command(["lab", "run", "examples/sizes.toml", "--on", "slurm", "--out", str(tmp_path)], debug=False) == 2
    assert capfd.readouterr().err == "error: --on slurm: write ray, or ray=ADDRESS\n"
