#!/usr/bin/env bash
# One node of a swarm on all GPUs of one machine of a Slurm cluster. Submit it as it is, or with an invite to join a swarm:
#
#   sbatch examples/slurm.sh
#   INVITE='gossamer://...' sbatch --time=12:00:00 examples/slurm.sh
#
# Five minutes before its time is over the job is asked for a checkpoint. Pre-empted or requeued, it goes on from there.
#SBATCH --job-name=gossamer
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

STATE=${STATE:-$HOME/gossamer/${SLURM_JOB_NAME:-gossamer}}
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
PORT=${PORT:-4001}

mkdir -p "$(dirname "$STATE")"
start=(gossamer node --state "$STATE" --listen "tcp://0.0.0.0:$PORT" --processes "${SLURM_GPUS_ON_NODE:-1}")
if [ ! -e "$STATE/settings.json" ] && [ -n "${INVITE:-}" ]; then
    gossamer join - --state "$STATE" --model "$MODEL" --no-start <<<"$INVITE" # not an argument, which others could read
elif [ ! -e "$STATE/settings.json" ]; then
    start+=(--model "$MODEL")
fi
# Slurm's KillWait is 30 s by default: the node gives up its round after 10 and saves in the others.
exec srun --kill-on-bad-exit=1 "${start[@]}" --set trainer.stop_grace=10
