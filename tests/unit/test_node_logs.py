"""Log events: one JSON object a line in the folder, one readable line on stderr."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from node.telemetry.logs import setup_logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    for handler in logging.root.handlers:
        if handler not in handlers:
            handler.close()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_event_is_one_line_with_its_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs(tmp_path)
    structlog.get_logger("node.run").info("listening", address="tcp://a:1", peer="x\ny")
    (event,) = events(tmp_path)
    assert (event["event"], event["address"], event["peer"]) == ("listening", "tcp://a:1", "x\ny")
    assert (event["level"], event["logger"]) == ("info", "node.run")
    error = capsys.readouterr().err
    assert "listening" in error and len(error.splitlines()) == 1


def test_libraries_are_heard_from_warning_up_and_debug_on_request(tmp_path: Path) -> None:
    setup_logs(tmp_path, stderr=False)
    logging.getLogger("transformers").info("quiet")
    logging.getLogger("transformers").warning("heard %d", 1)
    structlog.get_logger("protocol.host").debug("hidden")
    setup_logs(tmp_path, stderr=False, debug=True)
    structlog.get_logger("protocol.host").debug("shown")
    assert [event["event"] for event in events(tmp_path)] == ["heard 1", "shown"]


def test_a_failure_keeps_its_traceback_on_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs(tmp_path, stderr=False)
    try:
        raise ValueError("shape")
    except ValueError:
        structlog.get_logger("node.loop").exception("failed")
    (event,) = events(tmp_path)
    assert "ValueError: shape" in str(event["exception"])
    assert capsys.readouterr().err == ""
