#!/usr/bin/env bash
# What tests/interop/peer.mjs imports, for the long tests, into .venv-interop (42 MB). The package zeromq brings a libzmq.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    echo "no node and npm here: the test of the peer in JavaScript will be skipped" >&2
    exit 0
fi
mkdir -p .venv-interop
cp tests/interop/package.json .venv-interop
[ -d .venv-interop/node_modules/zeromq ] ||
    npm install --prefix .venv-interop --ignore-scripts --no-audit --no-fund --no-package-lock --silent
