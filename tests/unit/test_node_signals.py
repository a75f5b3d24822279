"""Which signals ask a node to stop."""

import os
import signal
import subprocess
import sys

import pytest

from node.processes.signals import stop_signals
from node.processes.worker_process import WorkerProcess

pytestmark = pytest.mark.slow


def test_a_terminal_that_goes_away_asks_as_a_person_does() -> None:
    with stop_signals() as received:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert received == [signal.SIGHUP, signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_under_nohup_the_terminal_does_not_matter() -> None:
    code = (
        "import os, signal\nfrom node.processes.signals import stop_signals\n"
        "with stop_signals() as received:\n os.kill(os.getpid(), signal.SIGHUP)\nprint(received)"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def run_script(code: str, *, stuck: float = 10) -> subprocess.CompletedProcess[str]:
    prelude = (
        "import os, signal, time\nfrom node.processes import signals\n"
        f"from node.processes.signals import GivenUp, graceful_stop\nsignals.STUCK_S = {stuck}\n"
    )
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=30)


def test_what_is_not_worth_waiting_for_is_given_up_with_the_signal() -> None:
    done = run_script(
        "with graceful_stop(600) as stopping:\n"
        " try:\n  os.kill(os.getpid(), signal.SIGTERM)\n  time.sleep(60)\n"
        " except GivenUp:\n  print(stopping.received)\n"
    )
    assert done.stdout == "[15]\n"


def test_a_call_that_does_not_heed_the_end_of_the_grace_period_ends_the_process_and_says_where() -> None:
    done = run_script(
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "with graceful_stop(0.1) as stopping, stopping.patient():\n"
        " os.kill(os.getpid(), signal.SIGTERM)\n time.sleep(60)\n",
        stuck=0.1,
    )
    assert done.returncode == 1 and 'File "<string>", line 8' in done.stderr


def test_after_the_work_has_ended_nothing_is_given_up() -> None:
    done = run_script(
        "with graceful_stop(0.05) as stopping:\n"
        " with stopping.patient():\n  os.kill(os.getpid(), signal.SIGTERM)\n  stopping.finish()\n"
        " time.sleep(0.2)\nprint('whole')",
        stuck=0.05,
    )
    assert (done.returncode, done.stdout) == (0, "whole\n")


def test_one_request_may_come_as_two_signals() -> None:
    done = run_script(
        "with graceful_stop(600) as stopping, stopping.patient():\n"
        " for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):\n  os.kill(os.getpid(), number)\n"
        " stopping.finish()\nprint(stopping.received)"
    )
    assert done.stdout == "[15]\n"


def test_a_worker_that_does_not_answer_is_given_up_and_can_be_killed() -> None:
    done = run_script(
        "import sys\nfrom node.processes.worker_process import WorkerProcess\n"
        "worker = WorkerProcess([sys.executable, '-c', 'import time; time.sleep(600)'], {})\n"
        "with graceful_stop(0.1) as stopping:\n"
        " try:\n"
        "  with stopping.patient():\n"
        "   os.kill(os.getpid(), signal.SIGTERM)\n   worker.call({'call': 'generate'}, 600)\n"
        " except GivenUp:\n  stopping.finish()\n  worker.kill()\n  print('killed')\n"
    )
    assert done.stdout == "killed\n"


def test_a_worker_that_even_the_kernel_cannot_end_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = WorkerProcess([sys.executable, "-c", "import time; time.sleep(600)"], {})
    monkeypatch.setattr("node.processes.worker_process.END_S", 0.01)
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    monkeypatch.setattr(subprocess.Popen, "send_signal", lambda *_: None)
    worker.kill()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitpid(worker.pid, 0)
