#!/usr/bin/env bash
# Several machines of a Slurm cluster: a Ray cluster for as long as the job lasts, and on it an experiment or a swarm.
# Install gossamer[ray] in an environment that all machines see, and activate it before. Submit it with a command of
# gossamer's that takes --on, in a folder that outlives the job:
#
#   sbatch examples/slurm-ray.sh lab run examples/rules.toml
#   sbatch --gpus-per-node=4 examples/slurm-ray.sh swarm --model Qwen/Qwen3-0.6B -n 16 --out runs/a
#
# Submitted again, it does the runs that are missing; a swarm goes on from its checkpoints. Five minutes before its time
# is over the job lets a swarm save them.
#SBATCH --job-name=gossamer-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@300
set -euo pipefail

: "${1:?usage: sbatch examples/slurm-ray.sh lab run FILE.toml, or swarm -n N --out FOLDER}"
PORT=${PORT:-6379}
export RAY_USAGE_STATS_ENABLED=0
# Ray listens on every address of each machine, and runs the code of whoever has this token. srun hands it on.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1') # awk reads to the last line
ADDRESS=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname --ip-address | awk '{print $1}') # nodes bind it
CPUS=${SLURM_CPUS_PER_TASK:-1}
srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" \
    ray start --head --node-ip-address="$ADDRESS" --port="$PORT" --num-cpus="$CPUS" --include-dashboard=false --block &
OTHERS=$((SLURM_JOB_NUM_NODES - 1))
if [ "$OTHERS" -gt 0 ]; then
    srun --overlap --nodes="$OTHERS" --ntasks="$OTHERS" --exclude="$HEAD" \
        ray start --address="$ADDRESS:$PORT" --num-cpus="$CPUS" --block &
fi
for _ in $(seq 60); do # until all machines have joined: a swarm shares out those that are there
    there=$(ray status --address "$ADDRESS:$PORT" 2>/dev/null | grep -c '^ 1 node_' || true)
    if [ "$there" -eq "$SLURM_JOB_NUM_NODES" ]; then break; fi
    sleep 2
done
trap 'kill -TERM "$!"' TERM # the last that was started in the background
srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" gossamer "$@" --on "ray=$ADDRESS:$PORT" &
wait "$!" || wait "$!" # again, for its end, if the signal ended the first
