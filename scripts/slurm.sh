#!/usr/bin/env bash
# Both steps on two machines of eight GPUs: sbatch scripts/slurm.sh /path/to/imagenet [--option value]...
# Preempted, or 10 minutes before its time is over, a step saves and leaves with code 75; the job is
# then queued again and goes on from there.
#SBATCH --job-name=adambnn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=7-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@600
set -euo pipefail
data="${1:?usage: sbatch scripts/slurm.sh /path/to/imagenet [--option value]...}"
shift
cd "$SLURM_SUBMIT_DIR"
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
for step in step1 step2; do
  code=0
  # One machine that ends for good ends the others, after what they take to save.
  srun --wait=400 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash "$step/run.sh" --data "$data" "$@" || code=$?
  [ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
  [ "$code" -eq 0 ] || exit "$code"
done
