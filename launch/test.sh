#!/usr/bin/env bash
# Installs everything into a virtual environment of its own, checks style, types and spelling, and runs the
# tests; arguments go to pytest, and then only the tests run.
#   bash launch/test.sh [tests/eval -k metrics ...]
# ARGENSEG_VENV: where the environment is (default .venv in the repository).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${ARGENSEG_VENV:-$PWD/.venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
# The locks are complete: every package by version and hash, so pip has nothing to resolve.
install() { "$venv/bin/python" -m pip install --quiet --no-deps --require-hashes "$@"; }
install -r requirements-test.txt
# A PyTorch without CUDA that is at hand (pip's find-links) saves some gigabytes.
install --no-index -r launch/requirements-torch.txt 2>/dev/null || install -r launch/requirements-torch.txt
"$venv/bin/python" -c "import torch" 2>/dev/null || install -r launch/requirements-torch-cuda.txt

# The full set of recorded reference numbers, where it is beside the repository.
if [ -z "${ARGENSEG_GOLDEN:-}" ] && [ -d ../shared/golden ]; then
  export ARGENSEG_GOLDEN="$PWD/../shared/golden"
fi
[ $# -gt 0 ] || bash launch/lint.sh
# Two files at a time: compiling, which most of the time goes into, takes one core.
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
