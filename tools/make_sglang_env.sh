#!/usr/bin/env bash
# Makes .venv-sglang with the SGLang that the tests run servers of, on a CPU. Does nothing if that is done already and
# the requirements have not changed since. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-sglang
requirements=tests/sglang_server/requirements.txt
stamp="$venv/installed-$(sha256sum "$requirements" | cut -c1-16)"
[ -e "$stamp" ] && exit 0

python=${PYTHON:-}
for candidate in .venv/bin/python python3.11 /usr/bin/python3.11 python3; do
    [ -n "$python" ] && break
    "$candidate" -c 'import ensurepip, venv, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && python=$candidate
done
if [ -z "$python" ]; then
    echo "make test-sglang: needs Python 3.11, for which the CPU build of PyTorch exists. On Debian 12:" >&2
    echo "    sudo apt-get install -y python3 python3-venv" >&2
    exit 1
fi

"$python" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
echo "make test-sglang: installing SGLang into $venv (3.3 GB, some three minutes)"
# First and exactly: with no PyTorch there, a package that depends on it would bring the newest CUDA build.
pip install torch==2.13.0
# SGLang asks for GPU packages that cannot be installed here, so everything it imports is listed.
pip install --no-deps --requirement "$requirements"
touch "$stamp"
