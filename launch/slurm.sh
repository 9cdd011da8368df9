#!/usr/bin/env bash
#SBATCH --job-name=argenseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=argenseg-%j.log
# Runs one argenseg command on a Slurm GPU cluster, one process per node.
#   sbatch launch/slurm.sh train --config CONFIG --workdir /shared/run
# Submit from the repository; the environment in .venv (or $ARGENSEG_VENV) must be visible to all
# nodes and hold `pip install '.[cuda]'`. DRY_RUN=1 bash launch/slurm.sh ... only prints.
set -euo pipefail
run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
[ -n "${DRY_RUN:-}" ] || cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
# jax finds the coordinator and the ranks in Slurm's own variables, and by itself would take one GPU
# per process.
export JAX_LOCAL_DEVICE_IDS="${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-1} - 1)))}"
run srun "${ARGENSEG_VENV:-.venv}/bin/python" -m argenseg_jax "$@" --distributed
