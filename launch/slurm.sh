#!/usr/bin/env bash
# Trains on several nodes under Slurm: one task on each, which takes all GPUs of its node.
# Usage, in the checkout, which lies like DIR on a disk that all nodes share:
#   sbatch --nodes=4 --gpus-per-node=8 [other sbatch options] launch/slurm.sh \
#     --config=configs/3b.py --workdir=DIR [--config.key=value ...]
# Told to stop (preempted, or near its time limit), the run writes a checkpoint and is queued again;
# so is one that lost a node, up to RESTARTS times (default 10). A run that ends by an error of its
# own is not. Meanwhile caprl-JOB.state/ holds each task's exit code and the number of lost nodes.
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
# shellcheck source=launch/exit_code.sh
source launch/exit_code.sh
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
  "$VENV/bin/python" -m pip install --quiet "jax[${JAX_EXTRA:-cuda12}]"
  # JAX's own choice under Slurm is one GPU a task.
  if [ "${SLURM_NTASKS_PER_NODE:-1}" -eq 1 ]; then
    JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))"
    export JAX_LOCAL_DEVICE_IDS
  fi
fi
state="$PWD/caprl-$SLURM_JOB_ID.state"
mkdir -p "$state"
rm -f "$state"/code-*
# srun returns the largest code, often that of a task it killed; so each task writes down its own.
# TERM reaches this shell too, which has to outlive Python's checkpoint.
# shellcheck disable=SC2016  # expanded in each task
task='trap : TERM; code=0; "$@" || code=$?; echo $code > "$0/code-$SLURM_PROCID"; exit $code'
told=0
srun --kill-on-bad-exit=1 bash -c "$task" "$state" \
  "$VENV/bin/python" -m caprl_jax.main "$@" || told=$?
code="$(exit_code "$(cat "$state"/code-* 2> /dev/null)")"
# A node that goes takes its task before that can write.
if [ "$told" -eq 0 ]; then code=0; elif [ "$code" -eq 0 ]; then code=76; fi
lost="$(cat "$state/lost" 2> /dev/null || echo 0)"
echo "exit code $code (srun's: $told), after $lost lost nodes"
case $code in
  75) ;;
  76)
    if [ "$lost" -ge "${RESTARTS:-10}" ]; then rm -r "$state"; exit "$code"; fi
    echo $((lost + 1)) > "$state/lost"
    ;;
  *) rm -r "$state"; exit "$code" ;;
esac
scontrol requeue "$SLURM_JOB_ID"
