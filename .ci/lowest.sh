#!/usr/bin/env bash
# Do the lower bounds of pyproject.toml hold? Install the lowest version of each requirement into .venv-lowest, and run the
# unit tests with them. What they need in turn is as new as they allow.
#
#     .ci/lowest.sh
#     TORCH=2.13.0+cpu UV_FIND_LINKS=FOLDER .ci/lowest.sh     with this build of torch; the oldest may want 5 GB of CUDA
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.venv-lowest
[ -x .venv-uv/bin/uv ] || .venv/bin/python -m pip install --quiet --target .venv-uv uv
[ -x "$folder/bin/python" ] || .venv/bin/python -m venv "$folder"
echo "${TORCH:+torch==$TORCH}" >"$folder/overrides.txt"
.venv-uv/bin/uv pip install --quiet --python "$folder/bin/python" --resolution lowest-direct \
    --overrides "$folder/overrides.txt" --editable '.[dev]'
"$folder/bin/python" -m pytest -n 2 --dist loadfile tests/unit
