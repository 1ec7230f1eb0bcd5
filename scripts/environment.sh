# source environment.sh REQUIREMENTS...: make the virtual environment $VENV (default: .venv in the
# repo) with Python 3.11 to 3.14, install the given requirements files, and activate it. All versions
# are those of requirements-lock.txt; CONSTRAINTS= leaves those of indirect requirements open.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$root/.venv}"
python="${PYTHON:-python3}"
if "$venv/bin/python" -m pip --version > /dev/null 2>&1; then python="$venv/bin/python"; fi
version="$("$python" --version 2>&1 || true)"
case "$version" in
  "Python 3.1"[1-4].*) ;;
  *) echo "error: Python 3.11 to 3.14 is needed, and $python is: $version; set PYTHON to another, or remove $venv" >&2
     exit 2 ;;
esac
[ "$python" = "$venv/bin/python" ] || "$python" -m venv "$venv"
source "$venv/bin/activate"
export PYTHON=python
constraints="${CONSTRAINTS-$root/requirements-lock.txt}"
for file in "$@"; do
  python -m pip install --quiet --disable-pip-version-check -r "$root/$file" \
    ${constraints:+-c "$constraints"}
done
