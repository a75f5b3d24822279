#!/usr/bin/env bash
# Write .ci/constraints.txt: the versions that CI and the images are made with, so that a commit always gives the same.
#
#     make constraints        a minute; it installs nothing but uv, into .venv-uv
#
# They are the newest that pyproject.toml and vLLM allow together, for the oldest Python that the project supports; newer
# ones run the same versions. So CI tests what the image for a GPU holds, except torch: pip's own settings choose its
# build. Run CI before you commit the file. Users get no constraints. uv does not read pip's settings; UV_INDEX_URL and
# the like are its own.
set -euo pipefail
cd "$(dirname "$0")/.."

file=.ci/constraints.txt
oldest=$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
[ -x .venv-uv/bin/uv ] || .venv/bin/python -m pip install --quiet --target .venv-uv uv
{
    echo "# Made by .ci/constraints.sh, for CI and the images alone."
    .venv-uv/bin/uv pip compile --quiet --no-header --no-annotate --python-version "$oldest" \
        --extra dev --extra vllm pyproject.toml - <<<"$1" | # what else CI installs
        grep -vE '^(torch|torchaudio|torchcodec|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==' # the machine's choice
} >"$file.new"
mv "$file.new" "$file"
echo "$file: $(grep -c == "$file") packages"
