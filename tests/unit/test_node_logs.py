"""Log events: one JSON object a line in the folder, one readable line on stderr."""

import json
import logging
import multiprocessing
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import structlog

from node.config import NodeConfig
from node.fleet.child_process import start_child, start_server
from node.telemetry import logs
from node.telemetry.logs import BackgroundHandler, flush_logs, setup_logs
from tests.log_places import hanging_log

pytestmark = pytest.mark.usefixtures("own_log_setup")


def events(folder: Path) -> list[dict[str, object]]:
    flush_logs()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_event_is_one_line_with_its_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs(tmp_path)
    structlog.get_logger("node.run").info("listening", address="tcp://a:1", peer="x\ny")
    (event,) = events(tmp_path)
    assert (event["event"], event["address"], event["peer"]) == ("listening", "tcp://a:1", "x\ny")
    assert (event["level"], event["logger"]) == ("info", "node.run")
    flush_logs()
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


def test_a_quiet_program_shows_warnings_and_keeps_the_rest_in_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logs(tmp_path, quiet=True)
    structlog.get_logger("node.run").info("loading")
    structlog.get_logger("node.loop").warning("a reward is out of range")
    flush_logs()
    error = capsys.readouterr().err
    assert "out of range" in error and len(error.splitlines()) == 1
    assert [event["event"] for event in events(tmp_path)] == ["loading", "a reward is out of range"]


def test_a_failure_keeps_its_traceback_on_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs(tmp_path, stderr=False)
    try:
        raise ValueError("shape")
    except ValueError:
        structlog.get_logger("node.loop").exception("failed")
    (event,) = events(tmp_path)
    assert "ValueError: shape" in str(event["exception"])
    assert capsys.readouterr().err == ""


def say_numbers(count: int) -> None:
    for number in range(count):
        structlog.get_logger("node.loop").info("said", number=number)


def test_who_logs_waits_for_no_place_that_hangs_and_the_lines_come_in_order(tmp_path: Path) -> None:
    with hanging_log(tmp_path) as place:
        setup_logs(tmp_path, stderr=False)
        teller = threading.Thread(target=say_numbers, args=(20,), daemon=True)
        teller.start()
        teller.join(20)
        assert not teller.is_alive()
        assert [event["number"] for event in place.read(20)] == list(range(20))


def test_lines_beyond_the_bound_are_dropped_and_the_log_says_where_and_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING", 10)
    with hanging_log(tmp_path) as place:
        setup_logs(tmp_path, stderr=False)
        say_numbers(30)
        place.read(10)
        flush_logs()  # says it; else the next line would
        structlog.get_logger("node.loop").info("after")
        flush_logs()
        *lines, last, after = place.read(12)
    expected = 0
    for line in [*lines, last]:  # the thread may take its first line while others are dropped: then there are two gaps
        if missing := re.match(r"(\d+) lines are missing here", str(line["event"])):
            assert line["level"] == "warning"
            expected += int(missing[1])
        else:
            assert line["number"] == expected
            expected += 1
    assert expected == 30 and missing and after["event"] == "after"
    assert sum(line["event"] == "said" for line in lines) in (10, 11)  # one may have been in the thread's hand


def test_a_places_own_level_and_form_hold() -> None:
    written: list[str] = []

    class Place(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    place, logger = Place(logging.ERROR), logging.getLogger("library")
    place.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler := BackgroundHandler(place))
    logger.warning("quiet %d", 0)
    logger.error("heard %d%%", 1)
    logger.removeHandler(handler)
    handler.close()
    assert written == ["ERROR heard 1%"]


def test_logs_that_are_set_up_twice_have_one_writer_and_closed_ones_none(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # some may be an earlier test's, and end meanwhile
    for _ in range(2):
        setup_logs(tmp_path, stderr=False)
        say_numbers(2)
    assert len(events(tmp_path)) == 4
    (writer,) = set(threading.enumerate()) - before
    logging.root.handlers[0].close()
    assert not writer.is_alive()


def test_a_thread_that_cannot_be_started_costs_the_line_that_wanted_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    setup_logs(tmp_path, stderr=False)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        patch.setattr(logging, "raiseExceptions", False)
        say_numbers(1)
    say_numbers(2)
    assert [event["number"] for event in events(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_a_forked_process_logs_and_repeats_nothing_of_its_parents(tmp_path: Path) -> None:
    def child() -> None:
        structlog.get_logger("node.loop").info("in the child")
        flush_logs()

    with hanging_log(tmp_path) as place:
        setup_logs(tmp_path, stderr=False)
        say_numbers(3)  # they wait while the process forks
        forked = multiprocessing.get_context("fork").Process(target=child)
        forked.start()
        assert len(place.read(4)) == 4
        forked.join()
        flush_logs()
        assert sorted(str(event["event"]) for event in place.read(4)) == ["in the child", "said", "said", "said"]


BURST = 3000  # lines, more than are written while Python ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"),
    [("pass", 0), ("raise SystemExit(3)", 3), ("raise ValueError", 1), ("kill(getpid(), SIGTERM)", 130)],
)
def test_all_that_was_logged_is_written_before_a_process_ends(tmp_path: Path, end: str, status: int) -> None:
    code = f"""
import sys
from os import getpid, kill
from pathlib import Path
from signal import SIGTERM
import structlog
from node.processes.signals import interrupting_signals
from node.telemetry.logs import setup_logs
setup_logs(Path({str(tmp_path)!r}), stderr=False)
try:
    with interrupting_signals():
        for number in range({BURST}):
            structlog.get_logger("node.loop").info("said", number=number)
        {end}
except KeyboardInterrupt:
    sys.exit(130)
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=60)
    assert child.returncode == status, child.stderr
    assert [event["number"] for event in events(tmp_path)] == list(range(BURST))


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    ["", "logs.flush_logs(); logs.FLUSH_S = 3600"],
    ids=["after one wait", "and waits no more where it waited before"],
)
def test_a_process_whose_log_hangs_ends(tmp_path: Path, before: str) -> None:
    code = f"""
from pathlib import Path
import structlog
from node.telemetry import logs
logs.FLUSH_S = 0.1
logs.setup_logs(Path({str(tmp_path)!r}), stderr=False)
structlog.get_logger("node.loop").info("said")
{before}
"""
    with hanging_log(tmp_path):
        child = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=60
        )
    assert (child.returncode, child.stderr) == (0, b"")


def say_and_fail(config: NodeConfig, folder: Path) -> None:
    logs.FLUSH_S = 60.0  # however slowly the test reads
    say_numbers(BURST)
    raise ValueError("shape")


@pytest.mark.slow
def test_a_supervised_node_that_crashes_leaves_its_log_whole(tmp_path: Path) -> None:
    with hanging_log(tmp_path) as place:
        child = start_child(start_server(()), say_and_fail, NodeConfig(), tmp_path)
        assert child.reason.recv() == "ValueError: shape"  # and now it ends
        *said, last = place.read(BURST + 1)
    assert len(said) == BURST and "ValueError: shape" in str(last["exception"])
    child.process.join()
