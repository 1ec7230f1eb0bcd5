#!/usr/bin/env bash
# From a fresh clone to a trained binary network, on a CPU, with the images the project draws:
#   bash scripts/quickstart.sh [--option value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
bash "$root/scripts/train_two_steps.sh" "$root/scripts/quickstart.yaml" "$@"
