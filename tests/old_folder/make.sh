#!/usr/bin/env bash
# Makes COMMIT.tar.xz: the folder of a node as that commit's code wrote it, for the tests of an upgrade.
# The node founded a swarm with an allowlist, admitted a guest by an invite, and trained among groups of both.
# And COMMIT-protocol.tar.xz: that commit's protocol/, for the tests of two versions.
#
#   tests/old_folder/make.sh [COMMIT]
set -euo pipefail
commit=${1:-19586e0}
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
python=$root/.venv/bin/python
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$work"' EXIT
git -C "$root" archive --prefix=old/ "$commit" | tar -x -C "$work"
export PYTHONPATH=$work/old OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
git -C "$root" archive "$commit" protocol | xz -9e >"$root/tests/old_folder/$commit-protocol.tar.xz"
cd "$work"

main='import sys; from node.cli import main; sys.exit(main())'
small=(--seed 5 --rounds 100000 --set trainer.save_steps=10 --set trainer.save_total_limit=1
    --set sampling.local=2 --set sampling.external=2)
"$python" -c "$main" found club --tasks builtin/sums --policy allowlist --listen tcp://127.0.0.1:0 --state n0 \
    --no-start "${small[@]}" >/dev/null
"$python" -c "$main" node --state n0 2>n0.txt &
first=$!
until [ -s n0/address ]; do sleep 0.2; done
invite=$("$python" -c "$main" invite n0 --uses 3 --expires 3650d 2>/dev/null)
"$python" -c "$main" join "$invite" --state n1 "${small[@]}" 2>n1.txt &
until [ -s n1/metrics.jsonl ] && [ "$(wc -l <n1/metrics.jsonl)" -gt 40 ]; do sleep 0.2; done
kill -TERM $first
wait $first || true
rm -f n0/lock
mv n0 folder
tar --owner=0 --group=0 --numeric-owner --sort=name -cJf "$root/tests/old_folder/$commit.tar.xz" folder
ls -l "$root/tests/old_folder/$commit.tar.xz"
