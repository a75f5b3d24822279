"""The image and the compose file without Docker: what they say, and their words with places of this machine."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.swarms import ROOT


@dataclass
class Image:
    """A variant of the image: its instructions in order, and what they set in the end."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


def read_image(variant: str) -> Image:
    """Follow the Dockerfile's stages of `variant`, each from the one it begins with."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {}
    steps: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.replace("${VARIANT}", variant).split()
            steps = stages[name] = list(stages.get(base, []))
        else:
            steps.append((word, rest.strip()))
    image = Image(stages["node"])
    for word, rest in image.steps:
        if word == "ENV":
            image.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "ENTRYPOINT":
            image.entrypoint, image.command = json.loads(rest), []  # Docker forgets a command that came before
        elif word == "CMD":
            image.command = json.loads(rest)
        elif word == "HEALTHCHECK":
            image.health = json.loads(rest.partition(" CMD ")[2])
    return image


def placed(words: list[str], places: Mapping[str, str]) -> list[str]:
    """Return `words` with each of `places`, the longest first, put in place of what the image calls it."""
    pattern = re.compile("|".join(map(re.escape, sorted(places, key=len, reverse=True))))
    return [pattern.sub(lambda match: places[match[0]], word) for word in words]


def read_compose(**variables: str) -> dict[str, Any]:
    """Return the compose file's tree as Compose reads it where the environment has `variables`."""
    text = (ROOT / "examples" / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):-(\w*)\}", lambda match: variables.get(match[1]) or match[2], text))


def command_of(service: Mapping[str, Any], image: Image) -> list[str]:
    """Return what a service of the compose file runs, without tini."""
    command = service["command"]
    words = [
        *service.get("entrypoint", image.entrypoint),
        *(shlex.split(command) if isinstance(command, str) else command),
    ]
    assert words[:2] == ["tini", "--"]
    return words[2:]
