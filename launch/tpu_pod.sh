#!/usr/bin/env bash
# Runs one argenseg command on every worker of a Cloud TPU slice, from a clone of this repository.
#   TPU=name ZONE=us-east5-b bash launch/tpu_pod.sh train --config CONFIG --workdir gs://bucket/run
# PROJECT: the Google Cloud project, where it is not the default one.
# Every worker gets the same copy of the working tree; the workdir and the data must be gs:// paths.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
on=("$TPU" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} --worker=all)

archive="$(mktemp --suffix=.tgz)"
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "${on[0]}:argenseg.tgz" "${on[@]:1}"
gcloud compute tpus tpu-vm ssh "${on[@]}" --command "
  set -e
  mkdir -p argenseg && tar -xzf argenseg.tgz -C argenseg && cd argenseg
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/pip install -q -r requirements.txt 'jax[tpu]==0.10.2' gcsfs
  .venv/bin/python -m argenseg_jax $(printf '%q ' "$@") --distributed"
