"""Where log events go: JSON lines into the node's folder, readable lines on stderr.

One event a line, with fields rather than prose. Events of libraries that use the
standard `logging` take the same way, from WARNING up.
"""

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog

from node.state_folder import make_folder

MAX_LOG_BYTES = 16 << 20  # one older file of the same size is kept beside it
OURS = ("node", "protocol", "collectives")


def setup_logs(folder: Path | None = None, *, stderr: bool = True, debug: bool = False) -> None:
    """Send this process's events to `folder`/log.jsonl, to stderr, or to both.

    Called once, by whoever owns the process (a command, or a supervised node's first
    lines). Raises `OSError` when the file cannot be opened, `UserError` when there can be no such folder.
    """
    handlers: list[logging.Handler] = []
    if folder is not None:
        make_folder(folder)
        file = RotatingFileHandler(folder / "log.jsonl", maxBytes=MAX_LOG_BYTES, backupCount=1, encoding="utf-8")
        file.setFormatter(_formatter(structlog.processors.format_exc_info, structlog.processors.JSONRenderer()))
        handlers.append(file)
    if stderr:
        stream = logging.StreamHandler(sys.stderr)
        plain = structlog.dev.plain_traceback
        stream.setFormatter(
            _formatter(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
        )
        handlers.append(stream)
    logging.basicConfig(handlers=handlers, level=logging.WARNING, force=True)
    # It keeps its messages to itself, on a handler of its own, from the moment it is imported.
    transformers = logging.getLogger("transformers")
    transformers.handlers.clear()
    transformers.propagate = True
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.INFO)
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
