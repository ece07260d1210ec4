#!/usr/bin/env bash
# Makes .venv and installs this project into it, with the tools for its tests. Does nothing if that is done already
# and setup.py has not changed since. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp="$venv/installed-$(sha256sum setup.py | cut -c1-16)"
[ -e "$stamp" ] && exit 0

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

# The CPU build of PyTorch that the project is tested with exists for 3.11, so that comes first.
python="" without_venv=""
for candidate in ${PYTHON:-python3.11 /usr/bin/python3.11 python3 python3.12}; do
    fits "$candidate" || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        python=$candidate
        break
    fi
    without_venv=${without_venv:-$candidate}
done
if [ -z "$python" ] && [ -n "$without_venv" ]; then
    echo "make env: $without_venv cannot make virtual environments. Install what is missing and try again:" >&2
    echo "    sudo apt-get install -y python3-venv" >&2
    exit 1
fi
if [ -z "$python" ]; then
    echo "make env: needs Python 3.11 or 3.12, found: $(python3 --version 2>&1 || true). On Debian 12:" >&2
    echo "    sudo apt-get install -y python3 python3-venv" >&2
    exit 1
fi

[ -x "$venv/bin/python" ] && fits "$venv/bin/python" || "$python" -m venv --clear "$venv"
rm -f "$venv"/installed-*
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
echo "make env: installing into $venv (1.6 GB, about a minute)"
pip install --upgrade pip
# First and exactly: with no PyTorch there, a package that depends on it would bring the newest CUDA build.
pip install torch==2.13.0
pip install --editable '.[dev]'
touch "$stamp"
