#!/usr/bin/env bash
# Both steps on two machines of eight GPUs: sbatch scripts/slurm.sh /path/to/imagenet
# A job that is requeued goes on from the last finished epoch.
#SBATCH --job-name=adambnn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=7-00:00:00
#SBATCH --requeue
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate
srun bash step1/run.sh --data "$1"
srun bash step2/run.sh --data "$1"
