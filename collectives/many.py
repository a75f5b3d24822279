"""Several operations one after the other, a few of them at a time."""

from collections.abc import Callable
from typing import TypeVar

from collectives.handles import Handle

R = TypeVar("R")


def wait_for_all(
    start: Callable[[int], Handle[R]], count: int, in_flight: int, again: tuple[type[Exception], ...]
) -> list[R]:
    """Start operation 0 to `count` - 1 with at most `in_flight` of them under way; return the results in order.

    One that ends in an error of `again` is started once more, until it ends otherwise. Any
    other error is raised once those under way have ended.
    """
    results: list[R] = []
    handles: dict[int, Handle[R]] = {}
    try:
        for index in range(count):
            for ahead in range(index, min(index + in_flight, count)):
                if ahead not in handles:
                    handles[ahead] = start(ahead)
            while len(results) == index:
                try:
                    results.append(handles[index].wait())
                except again:
                    handles[index] = start(index)
    finally:
        for index in range(len(results), count):
            if index in handles:
                handles[index].settle()
    return results
