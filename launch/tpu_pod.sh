#!/usr/bin/env bash
# Runs one argenseg command on every worker of a Cloud TPU slice, from a clone of this repository.
#   TPU=name ZONE=us-east5-b bash launch/tpu_pod.sh train --config CONFIG --workdir gs://bucket/run
# TYPE: asks for the slice first and waits for it, such as v5litepod-256 (with VERSION, the image of its
#   workers, default v2-alpha-tpuv5-lite; SPOT=1 for one that may be taken back).
# FETCH: a local folder that afterwards gets what a run wrote in its --workdir, but for checkpoints.
# PROJECT: the Google Cloud project, where it is not the default one. DRY_RUN=1: only prints.
# Every worker gets the same copy of the working tree; the workdir and the data must be gs:// paths.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
workdir=""
for ((i = 1; i <= $#; i++)); do
  case "${!i}" in
    --workdir=*) workdir="${!i#*=}" ;;
    --workdir) next=$((i + 1)); workdir="${!next:-}" ;;
  esac
done
if [ -n "${FETCH:-}" ] && [[ "$workdir" != gs://* ]]; then
  echo "error: FETCH needs a command with --workdir gs://..." >&2
  exit 2
fi

if [ -n "${TYPE:-}" ]; then
  run gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" "${where[@]}" \
    --accelerator-type "$TYPE" --runtime-version "${VERSION:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
  state=""
  while [ "$state" != ACTIVE ]; do
    state="$(run gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" --format 'value(state.state)')"
    [ -z "${DRY_RUN:-}" ] || { echo "$state"; break; }
    case "$state" in
      ACTIVE) ;;
      FAILED | SUSPENDED) echo "error: the queued resource $TPU is $state" >&2; exit 1 ;;
      *) echo "$TPU: $state" >&2; sleep 30 ;;
    esac
  done
fi

archive="$(mktemp --suffix=.tgz)"
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$TPU:argenseg.tgz" "${where[@]}" --worker=all
run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command "
  set -e
  mkdir -p argenseg && tar -xzf argenseg.tgz -C argenseg && cd argenseg
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/pip install -q '.[tpu]'
  .venv/bin/python -m argenseg_jax $(printf '%q ' "$@") --distributed"
if [ -n "${FETCH:-}" ]; then
  mkdir -p "$FETCH"
  run gcloud storage rsync --recursive --exclude='checkpoints/.*' "$workdir" "$FETCH"
fi
