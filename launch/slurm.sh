#!/usr/bin/env bash
# Trains on several nodes under Slurm: one task on each, which takes all GPUs of its node.
# Usage, in the checkout, which lies like DIR on a disk that all nodes share:
#   sbatch --nodes=4 --gpus-per-node=8 [other sbatch options] launch/slurm.sh \
#     --config=configs/3b.py --workdir=DIR [--config.key=value ...]
# Told to stop (preempted, or near its time limit), the run writes a checkpoint and is queued again;
# so is one that lost a node, up to RESTARTS times (default 10). A config that can't run is not.
#SBATCH --job-name=caprl
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
#SBATCH --output=caprl-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh ""
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
  "$VENV/bin/python" -m pip install --quiet "jax[${JAX_EXTRA:-cuda12}]"
  # JAX's own choice under Slurm is one GPU a task.
  if [ "${SLURM_NTASKS_PER_NODE:-1}" -eq 1 ]; then
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))"
    export JAX_LOCAL_DEVICE_IDS
  fi
fi
code=0
srun --kill-on-bad-exit=1 "$VENV/bin/python" -m caprl_jax.main "$@" || code=$?
restarts="${SLURM_RESTART_COUNT:-0}"
echo "exit code $code, after $restarts restarts"
case $code in
  0 | 1 | 2) exit "$code" ;;
  75) ;;
  *) [ "$restarts" -lt "${RESTARTS:-10}" ] || exit "$code" ;;
esac
scontrol requeue "$SLURM_JOB_ID"
