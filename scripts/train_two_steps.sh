#!/usr/bin/env bash
# The whole path at small scale: a real-valued teacher, step 1, step 2, and what came of them.
#   bash scripts/train_two_steps.sh CONFIG.yaml [--option value ...]   (options go to all three runs)
# The runs are named after the file: step1/out/NAME-teacher, step1/out/NAME, step2/out/NAME.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ $# -ge 1 ] || { echo "usage: bash scripts/train_two_steps.sh CONFIG.yaml [--option value ...]" >&2; exit 2; }
config=$1; shift
name="$(basename "$config" .yaml)"
teacher="$root/step1/out/$name-teacher"
step1="$root/step1/out/$name"
step2="$root/step2/out/$name"

bash "$root/step1/run.sh" --config "$config" "$@" --save "$teacher" \
  --binary_activations false --teacher none
bash "$root/step1/run.sh" --config "$config" "$@" --save "$step1" \
  --teacher "$teacher/model_best.pth.tar"
bash "$root/step2/run.sh" --config "$config" "$@" --save "$step2" \
  --teacher "$teacher/model_best.pth.tar" --init_from "$step1/model_best.pth.tar"

"${PYTHON:-python}" "$root/scripts/summarize.py" --picture "$step2/curves.png" \
  "teacher=$teacher" "step 1=$step1" "step 2=$step2"
