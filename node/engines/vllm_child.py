"""The node's side of the vLLM process: starting it, asking it, and making sure that it ends.

The process speaks the frames of `node.engines.vllm_worker` over a socket pair. It leads a
session of its own: a Ctrl-C in the terminal does not reach it, and the whole group, with
whatever vLLM may have started, is killed as one.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from node.engines.vllm_worker import Message, receive, send

LAST_LINES = 3  # of the log, quoted in an error
LAST_CHARACTERS = 400


class ChildError(Exception):
    """The child ended, fell silent or spoke nonsense, and is dead now; the text quotes the end of its log.

    `status` is its exit status, negative for a signal, or None when it had to be killed.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class Child:
    """A running worker process, until `kill` or the end of this one.

    It dies with the *thread* that starts it (as the kernel has it): start it from one that
    lives as long as the node.

    Args:
        command: its command line, to which the numbers of two file descriptors are added.
        environment: variables added to this process's own.
        log: file that its output is appended to.

    Raises:
        OSError: the command cannot be started or the log cannot be written.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._channel, channel = socket.socketpair()
        life, self._life = os.pipe()  # never written to: its end tells the child that this process is gone
        try:
            with channel, log.open("ab") as output:
                self._process = subprocess.Popen(
                    [*command, str(channel.fileno()), str(life)],
                    pass_fds=[channel.fileno(), life],
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError:
            self._channel.close()
            os.close(self._life)
            raise
        finally:
            os.close(life)

    @property
    def pid(self) -> int:
        """The process's id, which is also its group's."""
        return self._process.pid

    def call(self, message: Message, timeout: float) -> Message:
        """Send a request and return the reply to it.

        Raises:
            ChildError: no good reply within `timeout` seconds; the child has been killed.
        """
        deadline = time.monotonic() + timeout
        try:
            self._channel.settimeout(timeout)
            send(self._channel, message)
            return receive(self._channel, deadline)
        except TimeoutError:
            raise self._failed(f"no answer to {message['call']!r} in {timeout:g} s", None) from None
        except ValueError as error:
            raise self._failed(f"a malformed answer to {message['call']!r} ({error})", None) from None
        except (EOFError, OSError):
            status = self._status()
            raise self._failed(_describe(status), status) from None

    def kill(self) -> None:
        """End the child and all that it started, at once; harmless when that is done."""
        if self._channel.fileno() < 0:
            return
        self._channel.close()
        os.close(self._life)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _failed(self, reason: str, status: int | None) -> ChildError:
        self.kill()
        return ChildError(f"{reason}; {self._log} ends in: {_last_lines(self._log)}", status)

    def _status(self) -> int | None:
        """Return the status of a child that has closed its side, and so is about to end."""
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return None


def _describe(status: int | None) -> str:
    if status is None:
        return "it closed the channel"
    if status < 0:
        hint = ", as when memory runs out" if status == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}"
    return f"exit status {status}"


def _last_lines(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 14)))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:])[-LAST_CHARACTERS:] or "nothing"
