"""The seven built-in task families, in the standard library only."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from node.tasks.base import Task
from node.tasks.families import bases, decimals, fractions, logic, matrices, sums, weekdays
from node.tasks.families.base import build

FAMILIES: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {
        "sums": partial(build, "builtin/sums", sums.make),
        "bases": partial(build, "builtin/bases", bases.make),
        "fractions": partial(build, "builtin/fractions", fractions.make),
        "decimals": partial(build, "builtin/decimals", decimals.make),
        "matrices": partial(build, "builtin/matrices", matrices.make),
        "weekdays": partial(build, "builtin/weekdays", weekdays.make),
        "logic": partial(build, "builtin/logic", logic.make),
    }
)
"""Family name to constructor; each takes `difficulty` (1 to 10, default 1) and nothing else."""
