# source environment.sh REQUIREMENTS...: make the virtual environment $VENV (default: .venv in the
# repo) with Python 3.11 or newer, install the given requirements files, and activate it.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
source "$venv/bin/activate"
export PYTHON=python
for file in "$@"; do
  python -m pip install --quiet --disable-pip-version-check -r "$root/$file"
done
