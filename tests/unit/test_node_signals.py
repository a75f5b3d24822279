"""Which signals ask a node to stop."""

import os
import signal
import subprocess
import sys

from node.processes.signals import stop_signals


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
