#!/usr/bin/env bash
# Build what a release consists of, into dist/, and see that the wheel works where nothing else is installed.
#
#     gossamer-VERSION-py3-none-any.whl    for pip
#     gossamer-VERSION.tar.gz              its sources
#     gossamer-VERSION-image.tar.gz        the recipe of the image: docker build -t gossamer - <FILE
#
# It is built from the last commit. The wheel is installed as a user would do it, without constraints: 1.5 GB go into a
# temporary folder, and are downloaded where pip's cache has not got them. Nothing is uploaded.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) # in the archives: the same commit gives the same bytes
export SOURCE_DATE_EPOCH

if [ -n "$(git status --porcelain)" ]; then
    echo "error: a release is of a commit, and this tree has changes: see git status" >&2
    exit 1
fi
rm -rf dist
mkdir "$scratch/source" "$scratch/home"
git archive HEAD | tar -x -C "$scratch/source"
"$python" -m build --outdir dist "$scratch/source" >"$scratch/log" || { cat "$scratch/log" >&2 && exit 1; }
wheel=$(echo dist/*.whl)
version=${wheel#dist/gossamer-}
version=${version%%-*}
mapfile -t copied < <(sed -n 's/^!//p' .dockerignore)
git archive --format=tar.gz --output "dist/gossamer-$version-image.tar.gz" HEAD Dockerfile .dockerignore "${copied[@]}"

echo "installing $wheel into an empty environment"
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --progress-bar off "$wheel"

# From an empty folder and home, by an environment that names neither this tree nor this Python.
try() {
    echo "  $*"
    (cd "$scratch/home" && env -i HOME="$scratch/home" PATH="$scratch/venv/bin:/usr/bin:/bin" "$@" >"$scratch/said") ||
        { cat "$scratch/said" >&2 && exit 1; }
}
try python -m pip check
try gossamer --version
grep -qx "gossamer $version" "$scratch/said"
try gossamer demo --help
try python -c 'from gossamer import GRPOTrainer, Node, Swarm, __version__'
ls -l dist
