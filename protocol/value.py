"""Values: objects that never change, such as events, headers and actions. Each frame makes a dozen of them."""

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(cls: type[T]) -> type[T]:
    """Make a class a dataclass with slots, equal and hashed by its fields. The type checker lets no field change.

    It is not frozen at run time: that sets each field by a call, which took a twentieth of a round of 8 nodes.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
