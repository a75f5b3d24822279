#!/usr/bin/env bash
# Ray for the long tests, into .venv-ray (285 MB): beside what is installed, so that it changes nothing of it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv-ray/ray ] ||
    "${PYTHON:-.venv/bin/python}" -m pip install --quiet --progress-bar off --target .venv-ray "ray>=2.52,<3"
