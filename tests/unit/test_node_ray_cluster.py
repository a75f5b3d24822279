"""Who reaches a Ray cluster that a command starts, and what is said of one that it finds. Without Ray."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from structlog.testing import capture_logs

from node.errors import UserError
from node.fleet.ray_cluster import BEYOND_LOOPBACK, connected
from tests.fakes.ray_cluster import FakeRay, RayError

OURS = (BEYOND_LOOPBACK, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """Ray, on a machine where nothing was set and no cluster runs."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    with mock.patch.dict(os.environ, {"RAY_TMPDIR": str(tmp_path)}):
        for name in (*OURS, "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            os.environ.pop(name, None)
        yield fake


def seen_from(fake: FakeRay, address: str) -> None:
    fake.util = SimpleNamespace(get_node_ip_address=lambda: address)  # type: ignore[misc]  # of this one alone


def test_a_new_cluster_is_of_this_machine_alone_and_has_a_token_that_is_kept_nowhere(ray: FakeRay) -> None:
    with capture_logs() as said:
        assert connected("ray") is ray
    assert ray.given["address"] == "local" and ray.given["include_dashboard"] is False
    switch, mode, token = (os.environ[name] for name in OURS)
    assert (switch, mode) == ("0", "token") and re.fullmatch("[0-9a-f]{64}", token)
    assert said == []


def test_a_token_that_a_person_has_set_is_taken(ray: FakeRay) -> None:
    os.environ["RAY_AUTH_TOKEN_PATH"] = "/etc/ray/token"
    connected("ray")
    assert "RAY_AUTH_TOKEN" not in os.environ and os.environ["RAY_AUTH_MODE"] == "token"


def test_a_new_cluster_that_would_listen_beyond_this_machine_is_ended(ray: FakeRay) -> None:
    seen_from(ray, "192.0.2.2")
    with pytest.raises(UserError, match="listens beyond this machine: start a cluster with a token by `ray start`"):
        connected("ray")
    assert ray.is_shut_down


@pytest.mark.parametrize("how", ["named", "started here", "in the environment"])
def test_a_cluster_that_is_there_is_taken_as_it_is_and_one_without_a_token_is_told_of(
    how: str, ray: FakeRay, tmp_path: Path
) -> None:
    seen_from(ray, "192.0.2.2")
    if how == "started here":
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.2:6379")
    if how == "in the environment":
        os.environ["RAY_ADDRESS"] = "192.0.2.2:6379"
    on = "ray=192.0.2.2:6379" if how == "named" else "ray"
    with capture_logs() as said:
        connected(on)
    assert ray.given["address"] == ("192.0.2.2:6379" if how == "named" else "auto")
    assert os.environ.keys().isdisjoint(OURS)
    assert ["this Ray cluster has no token" in event["event"] for event in said] == [True]
    os.environ["RAY_AUTH_MODE"] = "token"
    with capture_logs() as said:
        connected(on)
    assert said == []


def test_a_cluster_that_refuses_is_one_line_that_names_the_token(ray: FakeRay) -> None:
    for error in (ConnectionError("refused"), RayError("Authentication token is missing")):
        ray.init = mock.Mock(side_effect=error)  # type: ignore[method-assign]
        with pytest.raises(
            UserError, match=r"no Ray cluster answers at a:1 .*set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ):
            connected("ray=a:1")


@pytest.mark.parametrize("name", ["node.py", "gossamer.py", "protocol/__init__.py"])
def test_a_file_of_the_current_folder_that_rays_workers_would_import_in_place_of_ours_is_named(
    name: str, ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{tmp_path / name} hides Gossamer's package"):
        connected("ray")
    (tmp_path / name).rename(tmp_path / "mine.py")
    assert connected("ray") is ray
