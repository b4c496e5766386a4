#!/usr/bin/env bash
# Trains on a TPU pod slice of Google Cloud; needs gcloud, logged in.
# Usage: ZONE=us-east5-b TYPE=v6e-16 bash launch/tpu_pod.sh COMMAND NAME
#   create NAME    asks for the slice (SPOT=1: preemptible) and waits for it
#   run NAME --config=configs/3b.py --workdir=bucket/DIR [--config.key=value ...]
#                  copies this checkout to all hosts, installs it and runs main.py on each; goes on
#                  from the last checkpoint after preemption, on a new slice if this one is gone
#   stop NAME      has the run write a checkpoint and end
#   delete NAME    gives the slice back
# BUCKET=NAME mounts that Cloud Storage bucket as bucket/ on each host: the workdir must be shared.
# VERSION is the slice's software (default v2-alpha-tpuv6e), PROJECT gcloud's own by default.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
command="$1" name="$2"
shift 2
options=(--zone="${ZONE:?set ZONE, for example us-east5-b}" --quiet)
[ -z "${PROJECT:-}" ] || options+=(--project="$PROJECT")

state() {
  gcloud compute tpus queued-resources describe "$name" "${options[@]}" \
    --format="value(state.state)" 2>/dev/null || echo NONE
}

create() {
  local spot=()
  [ -z "${SPOT:-}" ] || spot=(--spot)
  gcloud compute tpus queued-resources create "$name" --node-id="$name" "${options[@]}" \
    --accelerator-type="${TYPE:?set TYPE, for example v6e-16}" \
    --runtime-version="${VERSION:-v2-alpha-tpuv6e}" "${spot[@]}"
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in FAILED | SUSPENDED | NONE) echo "no slice: $(state)" >&2; return 1 ;; esac
    sleep "${POLL:-30}"
  done
}

delete() {
  gcloud compute tpus queued-resources delete "$name" --force "${options[@]}"
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" "${options[@]}" --worker=all --command="$1"
}

install() {
  local archive
  archive="$(mktemp -d)/caprl.tgz"
  git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf "$archive"
  gcloud compute tpus tpu-vm scp "$archive" "$name:caprl.tgz" "${options[@]}" --worker=all
  # Whatever a lost connection left running; [c] keeps the shell that runs this from matching.
  on_all "pkill -f '[c]aprl_jax.main'; mkdir -p caprl && tar -xzf caprl.tgz -C caprl && cd caprl && export PYTHON=${PYTHON:-python3}
    . launch/setup_venv.sh '' && \$VENV/bin/python -m pip install --quiet 'jax[tpu]'
    if [ -n '${BUCKET:-}' ] && ! mountpoint -q bucket; then
      mkdir -p bucket && gcsfuse --implicit-dirs '${BUCKET:-}' bucket
    fi"
}

run() {
  local quoted code restarts=0
  printf -v quoted ' %q' "$@"
  while true; do
    if [ "$(state)" != ACTIVE ]; then
      [ "$(state)" = NONE ] || delete
      create
    fi
    code=0
    install && on_all "cd caprl && rm -f stopped && \
      .venv/bin/python -m caprl_jax.main$quoted; code=\$?; [ -e stopped ] && exit 0; exit \$code" ||
      code=$?
    [ "$code" -ne 0 ] || return 0
    # 1 and 2, on a slice that stands, are errors of the run's own, which would come again.
    if [ "$code" -le 2 ] && [ "$(state)" = ACTIVE ]; then return "$code"; fi
    [ "$code" -eq 75 ] || restarts=$((restarts + 1))
    [ "$restarts" -le "${RESTARTS:-10}" ] || return "$code"
    echo "exit code $code: going on from the last checkpoint" >&2
  done
}

case "$command" in
  create) create ;;
  run) run "$@" ;;
  stop) on_all "cd caprl && touch stopped && pkill -TERM -f '[c]aprl_jax.main'" ;;
  delete) delete ;;
  *) echo "no command $command: create, run, stop or delete" >&2; exit 2 ;;
esac
