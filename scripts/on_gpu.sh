#!/usr/bin/env bash
# Measure on the first GPU at hand; no network is needed, and nothing is installed:
#   bash scripts/on_gpu.sh OUT [--tiny] [PART...]
# Parts: tests speed workers training, or the beginning of a name, as in speed-256.
# Each ends within 8 minutes. What is done (OUT/NAME.done) is not run again, and a training that was
# cut off goes on. --tiny runs all at its smallest, also on a CPU. DATA: images to train on.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python}"
[ $# -ge 1 ] || { echo "usage: bash scripts/on_gpu.sh OUT [--tiny] [PART...]" >&2; exit 2; }
mkdir -p "$1" && out="$(cd "$1" && pwd)" && shift || exit 2
[ "${1:-}" = --tiny ] && { tiny=yes; shift; } || tiny=
wanted=("$@")
failed=0
cd "$root"

part() {  # NAME PACKAGE COMMAND...
  local name=$1 package=$2 code=0 word chosen=$((${#wanted[@]} == 0)); shift 2
  for word in "${wanted[@]}"; do [[ "$name" != "$word"* ]] || chosen=1; done
  [ "$chosen" = 1 ] || return 0
  [ ! -e "$out/$name.done" ] || { echo "$name: done before"; return 0; }
  "$python" -c "import $package" 2> /dev/null || { echo "$name: skipped, there is no package $package"; return 0; }
  mkdir -p "$out/$name"
  echo "$name: $*"
  timeout -k 30 480 "$@" > "$out/$name.log" 2>&1 || code=$?
  case "$code" in
    0) touch "$out/$name.done" ;;
    75 | 124) echo "$name: not done after 8 minutes; the same command goes on" ;;
    *) echo "$name: failed with code $code, see $out/$name.log" >&2; failed=1 ;;
  esac
}

devices=(cpu cuda) batches=(256 128 64) size=() images=() short=()
files=(reference networks precision data distributed checkpoint_manager)
cases=("bfloat16, compiled" "bfloat16_residual, compiled" "bfloat16" "tf32, compiled" "tf32" "float32, compiled" "float32")
config=quickstart
[ ! -d data/cifar-10-batches-py ] || config=cifar10 short=(--train_per_class 1000 --val_per_class 200)
if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  [ -n "$tiny" ] || { echo "error: torch can use no GPU: pass --tiny to try everything on the CPU" >&2; exit 2; }
  devices=(cpu)
fi
if [ -n "$tiny" ]; then
  batches=(2) cases=("float32") size=(--image_size 32 --rounds 1) images=(--images 2)
  files=(data)
  short=(--train_per_class 4 --val_per_class 2 --epochs 1 --batch_size 4 --width 0.0625)
fi

for file in "${files[@]}"; do
  part "tests-$file" pytest "$python" -m pytest -q -rs -k cuda "tests/test_$file.py"
done
for batch in "${batches[@]}"; do for case in "${cases[@]}"; do
  name="speed-$batch-${case/, /-}"
  part "$name" matplotlib "$python" -m scripts.benchmarks.speed --only step evaluation --teacher \
    --batches "$batch" --cases "$case" --output "$out/$name" "${size[@]}"
done; done
part workers matplotlib "$python" -m scripts.benchmarks.speed --only workers --output "$out/workers" \
  "${size[@]}" "${images[@]}"
for device in "${devices[@]}"; do for step in 1 2; do
  [ "$step" = 1 ] || [ -e "$out/training-$device-1.done" ] || continue  # it starts from that one's end
  start=(); [ "$step" = 1 ] || start=(--init_from "$out/training-$device-1/model_best.pth.tar")
  part "training-$device-$step" tensorboard "$python" "step$step/train.py" --config "scripts/$config.yaml" \
    ${DATA:+--data "$DATA"} --teacher none --device "$device" --save "$out/training-$device-$step" \
    "${short[@]}" "${start[@]}"
done; done
"$python" -m scripts.benchmarks.gpu "$out" || failed=1
[ -n "$tiny" ] || cp "$out/README.md" docs/results/gpu/README.md
exit "$failed"
