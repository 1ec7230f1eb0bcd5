#!/usr/bin/env bash
# Set up the environment and run all checks: bash scripts/test.sh [pytest options]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt requirements-export.txt requirements-openvino.txt requirements-decoder.txt requirements-test.txt
cd "$root"
ruff check .
ruff format --check .
python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
