#!/usr/bin/env bash
# An experiment on several machines of a Slurm cluster: a Ray cluster for as long as the job lasts, and `gossamer lab` on it.
# Install gossamer[ray] in an environment that all machines see, and activate it before.
#
#   sbatch examples/slurm-ray.sh examples/rules.toml
#
# Submitted again, it does the runs that are missing.
#SBATCH --job-name=gossamer-lab
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
set -euo pipefail

FILE=${1:?usage: sbatch examples/slurm-ray.sh FILE.toml}
PORT=${PORT:-6379}
export RAY_USAGE_STATS_ENABLED=0

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
CPUS=${SLURM_CPUS_PER_TASK:-1}
srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" \
    ray start --head --node-ip-address="$HEAD" --port="$PORT" --num-cpus="$CPUS" --include-dashboard=false --block &
for _ in $(seq 60); do
    if ray status --address "$HEAD:$PORT" >/dev/null 2>&1; then break; fi
    sleep 2
done
OTHERS=$((SLURM_JOB_NUM_NODES - 1))
if [ "$OTHERS" -gt 0 ]; then
    srun --overlap --nodes="$OTHERS" --ntasks="$OTHERS" --exclude="$HEAD" \
        ray start --address="$HEAD:$PORT" --num-cpus="$CPUS" --block &
fi
srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" gossamer lab run "$FILE" --on "ray=$HEAD:$PORT"
