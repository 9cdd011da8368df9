#!/usr/bin/env bash
# Installs everything into a virtual environment of its own and runs the tests; arguments go to pytest.
#   bash launch/test.sh [tests/eval -k metrics ...]
# ARGENSEG_VENV: where the environment lives (default .venv in the repository).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${ARGENSEG_VENV:-$PWD/.venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -r requirements.txt
"$venv/bin/python" -m pip install --quiet torch==2.13.0  # first: torchmetrics takes the torch that is there
"$venv/bin/python" -m pip install --quiet -r requirements-test.txt

# The full set of recorded reference numbers, where it lies beside the repository.
if [ -z "${ARGENSEG_GOLDEN:-}" ] && [ -d ../shared/golden ]; then
  export ARGENSEG_GOLDEN="$PWD/../shared/golden"
fi
# Two files at a time: compiling, which most of the time goes into, takes one core.
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
