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
# shellcheck source=launch/exit_code.sh
source launch/exit_code.sh
options=(--zone="${ZONE:?set ZONE, for example us-east5-b}" --quiet)
[ -z "${PROJECT:-}" ] || options+=(--project="$PROJECT")

state() { # NONE: there is no slice; UNKNOWN: gcloud failed
  local told
  if told="$(gcloud compute tpus queued-resources describe "$name" "${options[@]}" \
    --format="value(state.state)" 2>&1)"; then
    echo "${told##*$'\n'}"
  else
    case "$told" in *NOT_FOUND*) echo NONE ;; *) echo "$told" >&2; echo UNKNOWN ;; esac
  fi
}

ask() {
  local spot=()
  [ -z "${SPOT:-}" ] || spot=(--spot)
  gcloud compute tpus queued-resources create "$name" --node-id="$name" "${options[@]}" \
    --accelerator-type="${TYPE:?set TYPE, for example v6e-16}" \
    --runtime-version="${VERSION:-v2-alpha-tpuv6e}" "${spot[@]}"
}

create() { # asks where there is no slice, or a dead one, and waits for it in the queue
  local now asked=""
  while now="$(state)" && [ "$now" != ACTIVE ]; do
    case "$now" in
      NONE | FAILED)
        [ -z "$asked" ] || { echo "no slice: $now" >&2; return 1; }
        [ "$now" = NONE ] || delete || return 1
        ask || return 1
        asked=1
        ;;
      SUSPENDED) { delete && ask; } || return 1 ;;
      *) sleep "${POLL:-30}" ;; # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, CREATING, ..
    esac
  done
}

delete() {
  gcloud compute tpus queued-resources delete "$name" --force "${options[@]}"
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" "${options[@]}" --worker=all --command="$1"
}

install() {
  local files code=0
  files="$(mktemp -d)"
  { git ls-files -z --cached --others --exclude-standard |
    tar --null -T - -czf "$files/caprl.tgz" &&
    gcloud compute tpus tpu-vm scp "$files/caprl.tgz" "$name:caprl.tgz" "${options[@]}" \
      --worker=all; } || code=$?
  rm -r "$files"
  [ "$code" -eq 0 ] || return "$code"
  # Whatever a lost connection left running; [c] keeps the shell that runs this from matching.
  on_all "pkill -f '[c]aprl_jax.main'; set -e
    mkdir -p caprl; tar -xzf caprl.tgz -C caprl; cd caprl; export PYTHON=${PYTHON:-python3}
    . launch/setup_venv.sh ''
    \$VENV/bin/python -m pip install --quiet 'jax[tpu]'
    if [ -n '${BUCKET:-}' ] && ! mountpoint -q bucket; then
      mkdir -p bucket; gcsfuse --implicit-dirs '${BUCKET:-}' bucket
    fi
    rm -f stopped code"
}

# Runs main.py on all hosts and prints what it comes to. Each host writes down its own code, for
# gcloud's depends on which connection ended first; `stop` reaches the shell too, which must outlive
# Python's checkpoint to do so, and then there is nothing to start again.
main() {
  local quoted
  printf -v quoted ' %q' "$@"
  on_all "trap : TERM; cd caprl && .venv/bin/python -m caprl_jax.main$quoted; code=\$?
    if [ -e stopped ] && [ \$code -gt 2 ]; then code=0; fi
    echo \$code > code" >&2 || :
  exit_code "$(on_all "cat caprl/code" 2> /dev/null | tr -d '\r')"
}

run() {
  local code restarts=0
  while true; do
    create
    if install; then
      code="$(main "$@")"
    else
      code=76
      echo "the checkout can't be installed on all hosts" >&2
      sleep "${POLL:-30}"
    fi
    case $code in 0 | 1 | 2) return "$code" ;; esac
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
