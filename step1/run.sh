#!/usr/bin/env bash
# Step 1 on every visible GPU (or the CPU), from any directory: bash run.sh [--option value ...]
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python}" "$here/../utils/launch.py" "$here/train.py" "$@"
