"""Short names for node ids: what people call a peer, "amber-otter-3f", where the id is too long to say.

A name is a function of the id alone, so that it is the same at every node, and nobody chooses it. It names nobody
for certain (one of 262,144): it is shown beside the id and never taken instead of it.
"""

import hashlib

_ADJECTIVES = """
amber ample azure brave brisk broad calm clear coral crisp deft dry early eager even fair fine firm fleet fond
free fresh glad gold grand green happy hardy high ivory jade keen kind late lean light lilac lively lunar merry
mild mint neat noble olive pearl plain plum polar proud quick quiet rapid ready rosy ruby rusty sage solar
solid sunny swift tidy vivid
"""
_ANIMALS = """
adder badger bat bear beaver bison boar camel carp cat cod crab crane crow deer dove duck eagle eel elk falcon
ferret finch fox frog gecko goat goose gull hare hawk heron horse ibex jay kite koala lark lemur lion lynx mole
moose moth mouse newt otter owl panda perch pike puma quail rabbit ram raven robin seal shrew sloth snail stork
swan tapir
"""


def short_name(node_id: str) -> str:
    """Return the name of a node id, e.g. "amber-otter-3f"."""
    digest = hashlib.sha256(node_id.encode()).digest()
    adjective, animal = _ADJECTIVES.split()[digest[0] % 64], _ANIMALS.split()[digest[1] % 64]
    return f"{adjective}-{animal}-{digest[2] % 64:02x}"
