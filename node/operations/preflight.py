"""Checks that need neither torch, whose import takes seconds, nor a loaded model.

Each check is as cheap as it can be. One that passes promises nothing: what needs the thing says so later.
"""

import importlib.util
import shutil
import socket
from pathlib import Path

from node.config import NodeConfig
from node.engines.missing import missing
from node.errors import UserError
from node.policy.detection import check_bits, check_policy, check_trackers

LEAST_DISK = 16 << 20  # bytes: the built-in policy's checkpoints and some metrics
PACKAGES = ("gossamer", "node", "collectives", "protocol")


def check_first(config: NodeConfig, folder: Path) -> None:
    """Look for what would end a node in `folder` anyway, in well under a second.

    Raises:
        UserError: a full disk, a busy port, no such GPU, no vLLM, no bitsandbytes, no tracker that is named, no server
            that answers, or a model without weights.
    """
    check_place(config, folder)
    if config.role != "relay":
        check_means(config)


def check_place(config: NodeConfig, folder: Path) -> None:
    """Raise `UserError` for a full disk, or a busy port of the page."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    usage = shutil.disk_usage(existing)
    if usage.total and usage.free < LEAST_DISK:  # what is no disk has no size either
        raise UserError(
            f"the disk that holds {folder} is full ({usage.free / 1e6:.0f} MB are free): free some space, or choose "
            "another folder"
        )
    page = config.observe
    if page.enabled and page.port:
        family = socket.AF_INET6 if ":" in page.host else socket.AF_INET
        try:
            socket.create_server((page.host, page.port), family=family).close()
        except OSError as error:
            raise UserError(
                f"cannot listen on {page.host}:{page.port} ({error.strerror}): set observe.port=0, or another"
            ) from None


def check_means(config: NodeConfig) -> None:
    """Raise `UserError` where this machine lacks what training takes: a GPU, a library, a server, weights."""
    check_policy(config.policy)
    check_bits(config.policy.dtype, config.trainer.options.optim)
    check_trackers(config.trainer.options.report_to)
    if lacks := missing(config.engine.kind, config.engine):
        raise UserError(lacks)


def check_unhidden(folder: Path) -> None:
    """Raise `UserError` where Python, started in `folder`, would import something else than our packages."""
    for name in PACKAGES:
        ours = importlib.util.find_spec(name)
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file() and ours and ours.origin and not path.samefile(ours.origin):
                raise UserError(
                    f"{path} hides Gossamer's package {name!r} there: rename it, or start from another folder"
                )
