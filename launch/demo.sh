#!/usr/bin/env bash
# From nothing to a trained model: installs, trains configs/nano.py from scratch, scores it, draws
# masks with it and with the shipped model, and writes one report. Some minutes on two cores.
#   bash launch/demo.sh [WORKDIR]          (default runs/demo; a stopped run goes on)
# ARGENSEG_VENV: where the environment lives (default .venv in the repository).
# The last line on stdout is JSON: gIoU, cIoU, baseline_gIoU, seconds, report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="${1:-runs/demo}"

venv="${ARGENSEG_VENV:-$PWD/.venv}"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --no-deps --require-hashes -r requirements.txt
# Every step is a process of its own: what one has compiled, the next one reads.
export JAX_COMPILATION_CACHE_DIR="$PWD/.jax_cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
argenseg() { "$venv/bin/python" -m argenseg_jax "$@"; }

SECONDS=0
argenseg train --config configs/nano.py --workdir "$work" >&2
while IFS=$'\t' read -r file prompt; do
  for model in "$work" nano; do
    name="${file%.png} by $(basename "$model")"
    argenseg segment --checkpoint "$model" --image "examples/shapes/$file" --prompt "$prompt" \
      --out "$work/masks/$name.png" --overlay "$work/pictures/$name. $prompt.png" </dev/null >&2
  done
done <examples/shapes/prompts.tsv
argenseg evaluate --workdir "$work" --data shapes:simple:unseen --previews 0 >&2
result="$(argenseg evaluate --workdir "$work" --data shapes:simple:test | tail -n 1)"
"$venv/bin/python" -c 'import json, sys
print(json.dumps(json.loads(sys.argv[1]) | {"seconds": int(sys.argv[2])}))' "$result" "$SECONDS"
