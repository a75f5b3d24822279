"""Where log events go: JSON lines into the node's folder, readable lines on stderr.

One event a line, with fields rather than prose. Events of libraries that use the
standard `logging` take the same way, from WARNING up.

The caller makes the line and waits for nothing: the network thread logs too, and a disk or a terminal may hang. Each
place has a thread that writes to it. Waiting lines are written when Python ends. `multiprocessing` ends its processes
otherwise, so these call `flush_logs`; what kills a process at once takes the last lines with it.
"""

import copy
import logging
import os
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path

import structlog

from node.state_folder import make_folder

MAX_LOG_BYTES = 16 << 20  # one older file of the same size is kept beside it
MAX_WAITING = 4096  # lines for a place that is slow, some MB; a node at work writes a few a second
FLUSH_S = 2.0  # an end waits so long for a place that hangs: a service manager kills after tens of seconds
OURS = ("node", "protocol", "collectives")


def setup_logs(folder: Path | None = None, *, stderr: bool = True, debug: bool = False, quiet: bool = False) -> None:
    """Send this process's events to `folder`/log.jsonl, to stderr, or to both; if `quiet`, only warnings to stderr.

    Called once, by whoever owns the process (a command, or a supervised node's first
    lines). Raises `OSError` when the file cannot be opened, `UserError` when there can be no such folder.
    """
    logging.basicConfig(handlers=_handlers(folder, stderr=stderr, quiet=quiet), level=logging.WARNING, force=True)
    # It keeps its messages to itself, on a handler of its own, from the moment it is imported.
    transformers = logging.getLogger("transformers")
    transformers.handlers.clear()
    transformers.propagate = True
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
    _log_events()


@contextmanager
def logs_of_block(folder: Path) -> Iterator[None]:
    """Send the events of a block in somebody's program to `folder`/log.jsonl and stderr; what it logs is its matter.

    Raises as `setup_logs` does.
    """
    loggers = list(map(logging.getLogger, OURS))
    before = [(logger.level, logger.propagate) for logger in loggers]
    configured = structlog.get_config() if structlog.is_configured() else None
    handlers = _handlers(folder)
    _log_events()
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        structlog.reset_defaults()
        if configured is not None:
            structlog.configure(**configured)
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()


def _handlers(folder: Path | None, *, stderr: bool = True, quiet: bool = False) -> list[logging.Handler]:
    handlers: list[logging.Handler] = []
    if folder is not None:
        make_folder(folder)
        file = RotatingFileHandler(folder / "log.jsonl", maxBytes=MAX_LOG_BYTES, backupCount=1, encoding="utf-8")
        file.setFormatter(_formatter(structlog.processors.format_exc_info, structlog.processors.JSONRenderer()))
        handlers.append(BackgroundHandler(file))
    if stderr:
        stream = logging.StreamHandler(sys.stderr)
        stream.setLevel(logging.WARNING if quiet else logging.NOTSET)
        plain = structlog.dev.plain_traceback
        stream.setFormatter(
            _formatter(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
        )
        handlers.append(BackgroundHandler(stream))
    return handlers


def _log_events() -> None:
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def log_by_logging() -> None:
    """Hand events to Python's `logging`, where nothing else was set up: in somebody's program, whose matter logs are.

    They are of the loggers "node", "protocol" and "collectives"; without a word of the program, warnings go to stderr.
    """
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.processors.format_exc_info,
                structlog.processors.KeyValueRenderer(key_order=["event"]),
            ],
            logger_factory=structlog.stdlib.LoggerFactory(),
            wrapper_class=structlog.stdlib.BoundLogger,
        )


def flush_logs() -> None:
    """Wait until what was logged is written, at most `FLUSH_S` for each place, and once for one that hangs."""
    for handler in _places():
        handler.flush()


def _places() -> set[logging.Handler]:
    return {handler for name in ("", *OURS) for handler in logging.getLogger(name).handlers}


class BackgroundHandler(QueueHandler):
    """Makes each line as `target` would and has a thread write it there, in order. To log never waits for `target`.

    While `MAX_WAITING` lines wait, more are dropped; a line in their place says how many. The thread starts with the
    first line, in a forked process too: what waited at the fork its parent writes.

    When Python ends, `logging` waits for the lock of each handler that was made, and the thread holds that of a place
    that hangs. So the thread has a copy of `target`, of which `logging` does not know; let go of `target` itself.
    """

    def __init__(self, target: logging.Handler) -> None:
        super().__init__(queue.Queue())
        self.setFormatter(target.formatter)
        self._target = copy.copy(target)
        self._target.createLock()  # a lock that is anew in a forked process
        self._target.setFormatter(None)  # what it gets is a line already
        self._begin_anew()

    def after_fork(self) -> None:
        """Go on in a forked process: the thread, and a file's locks that it held, are the parent's."""
        self._begin_anew()
        if isinstance(self._target, logging.FileHandler):
            self._target.stream = None  # it opens its file again

    def _begin_anew(self) -> None:
        self.queue = self._lines = queue.Queue[logging.LogRecord | None]()
        self._listener: QueueListener | None = None
        self._dropped = 0
        self._hangs = False  # a flush waited in vain, and all was never written since

    def enqueue(self, record: logging.LogRecord) -> None:
        """Let a line wait for the thread, if there is room. `logging` calls it under this handler's lock."""
        if self._lines.qsize() >= MAX_WAITING:
            self._dropped += 1
            return
        self._say_dropped()
        self._put(record)

    def flush(self) -> None:
        """Wait until all that waits is written, at most `FLUSH_S`, and not again for a place that hangs."""
        self.acquire()
        try:
            self._say_dropped()
        finally:
            self.release()
        lines = self._lines
        with lines.all_tasks_done:
            wait = 0.0 if self._hangs else FLUSH_S
            self._hangs = not lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, wait)

    def close(self) -> None:
        """Flush, and end the thread. Where `target` hangs, that ends once it has written what waits."""
        self.acquire()
        try:
            self.flush()
            listener = self._listener
            if listener is not None and self._hangs:
                listener.enqueue_sentinel()
            else:
                if listener is not None:
                    listener.stop()
                self._target.close()
            self._begin_anew()
        finally:
            self.release()
        super().close()

    def _say_dropped(self) -> None:
        if self._dropped:
            text = f"{self._dropped} lines are missing here: what is logged could not be written as fast"
            self._dropped = 0
            self._put(self.prepare(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)))

    def _put(self, line: logging.LogRecord) -> None:
        if self._listener is None:
            listener = QueueListener(self._lines, self._target, respect_handler_level=True)
            listener.start()  # fails where there are too many threads: the next line tries again
            self._listener = listener
        self._lines.put_nowait(line)


def _after_fork() -> None:
    for handler in _places():
        if isinstance(handler, BackgroundHandler):
            handler.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _shared() -> list[structlog.typing.Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _formatter(*last: structlog.typing.Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_shared(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
