"""Every reason for which something is refused is explained, and no other."""

import re

from node.rollouts.screening import BLAMELESS
from node.telemetry.refusals import MEANINGS, meaning
from protocol.credentials.grants import REFUSALS
from protocol.wire.version import OTHER_VERSION
from tests.swarms import ROOT

BEFORE = (
    r"(?:Error|Blame|offence|_cut|_refused|Refused|ReadResult)\([^()\"]*",  # what is called with it
    r"HANDSHAKE_FAILED_[A-Z_]+: ",
    r"rejected\.update\(\{",
)
GIVEN = re.compile(f'(?:{"|".join(BEFORE)})"([a-z_]+)"')
SOURCES = [
    path.read_text()
    for folder in ("protocol", "node/rollouts", "node/swarm")
    for path in (ROOT / folder).rglob("*.py")
    if "simulator" not in path.parts
]


def test_each_reason_that_the_code_gives_is_explained() -> None:
    given = {reason for text in SOURCES for reason in GIVEN.findall(text)} | REFUSALS | BLAMELESS | {OTHER_VERSION}
    assert len(given) > 40
    assert given - MEANINGS.keys() == set()
    assert meaning("of tomorrow") == ""


def test_nothing_is_explained_that_the_code_does_not_say() -> None:
    assert [reason for reason in MEANINGS if not any(f'"{reason}"' in text for text in SOURCES)] == []
