#!/usr/bin/env bash
# Runs a recipe on two machines of four GPUs: sbatch examples/deploy/slurm.sh
#SBATCH --job-name=wmtp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=wmtp-%j.log
set -euo pipefail

# one process starts the others of its machine; the step's result does not depend on how many there are
WMTP_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export WMTP_MASTER_ADDR WMTP_MASTER_PORT=29500 WMTP_NNODES=$SLURM_NNODES

# --resume auto: a job that was requeued continues from its checkpoint
# shellcheck disable=SC2016  # each machine fills in its own number
srun --kill-on-bad-exit=1 bash -c \
    'WMTP_NODE_RANK=$SLURM_NODEID exec wmtp run recipe.toml --run-name "slurm-$SLURM_JOB_ID" --resume auto'
