#!/usr/bin/env bash
# Trackers for the slow tests, into .venv-trackers (320 MB): beside what is installed, so that they change nothing of it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv-trackers/wandb ] && [ -d .venv-trackers/trackio ] ||
    "${PYTHON:-.venv/bin/python}" -m pip install --quiet --progress-bar off --target .venv-trackers "wandb>=0.19" "trackio>=0.21"
