#!/usr/bin/env bash
# Style, types and spelling, by the tools that launch/test.sh has installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="${ARGENSEG_VENV:-$PWD/.venv}/bin"

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/codespell"
"$bin/shellcheck" launch/*.sh
