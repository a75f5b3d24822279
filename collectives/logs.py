"""Where collectives logs: as `structlog` is configured, or else to stderr. A program's stdout is its own."""

import sys
from typing import Any

import structlog


class Log:
    """A logger; it looks at each call how `structlog` is configured."""

    def __getattr__(self, name: str) -> Any:
        configured = structlog.is_configured()
        log = structlog.get_logger() if configured else structlog.wrap_logger(structlog.PrintLogger(sys.stderr))
        return getattr(log, name)
