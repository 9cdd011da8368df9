#!/usr/bin/env bash
# What is too slow for every change: the newest jax that is allowed, slow tests, long property tests with the
# key-reuse check, coverage (coverage.txt), and the parity tests compiled as users compile.
# ARGENSEG_VENV: where the environment is (default .venv-nightly); JAX: its version (default the newest allowed).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv="${ARGENSEG_VENV:-$PWD/.venv-nightly}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet ".[test,lint]" "jax${JAX:+==$JAX}"
if [ -z "${ARGENSEG_GOLDEN:-}" ] && [ -d ../shared/golden ]; then
  export ARGENSEG_GOLDEN="$PWD/../shared/golden"
fi
HYPOTHESIS_PROFILE=long "$venv/bin/python" -m pytest -n auto --dist loadfile -m "slow or not slow" \
  --cov=argenseg_jax --cov-report=term | tee coverage.txt
ARGENSEG_XLA_LEVEL=default "$venv/bin/python" -m pytest tests/parity tests/models
JAX_DEBUG_KEY_REUSE=1 "$venv/bin/python" -m pytest tests/train/test_step.py tests/decode
