#!/usr/bin/env bash
# Locks what launch/*.in ask for, with the hash of every file, for Python 3.11 and 3.12:
#   requirements.txt              what argenseg_jax runs on
#   requirements-test.txt         what the tests and checks need, that included, PyTorch left out
#   launch/requirements-torch.txt PyTorch; launch/requirements-torch-cuda.txt: what its CUDA build needs too
# Needs uv. Run it after a change of launch/*.in, and commit what it writes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock() { uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate "$@"; }
head_line() { printf '# Written by launch/lock.sh; not to be edited.\n'; }

all="$(mktemp)"
trap 'rm -f "$all"' EXIT
lock launch/requirements-test.in >"$all"
{ head_line; lock launch/requirements.in --constraints "$all"; } >requirements.txt  # the versions that are tested
# A requirement is a line that begins with a name, and the indented lines of hashes after it.
part() { awk -v pattern="$1" -v want="$2" '/^[A-Za-z]/ { hit = ($0 ~ pattern) } hit == want' "$all"; }
{ head_line; part '^(torch==|triton|nvidia-|cuda-)' 0; } >requirements-test.txt
{ head_line; part '^torch==' 1
  # PyTorch's build without CUDA, for those who bring it (pip's --find-links).
  printf '%s\n' "    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
} | sed '$!{/--hash/{/\\$/!s/$/ \\/}}' >launch/requirements-torch.txt
{ head_line; part '^(triton|nvidia-|cuda-)' 1; } >launch/requirements-torch-cuda.txt
