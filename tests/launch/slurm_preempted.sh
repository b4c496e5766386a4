#!/usr/bin/env bash
# Preempts and lets go on a run of launch/slurm.sh; run it by slurm_cluster.sh, in the checkout.
# Usage: slurm_preempted.sh FOLDER STEP [main.py's arguments]
# Another job takes the node when metrics.jsonl has STEP. FOLDER takes the run, its log and `states`:
# seconds, state and number of restarts of the job, one line a change.
set -euo pipefail
folder="$1" step="$2"
shift 2
job="$(sbatch --parsable --ntasks-per-node=2 --output="$folder/job.log" \
  launch/slurm.sh --workdir="$folder/run" "$@")"
began=$SECONDS other="" last=""
while true; do
  now="$(scontrol show job "$job" | grep -oE '(JobState|Restarts|ExitCode)=[^ ]+' | xargs)"
  if [ "$now" != "$last" ]; then
    echo "$((SECONDS - began)) s: $now" | tee -a "$folder/states"
    last="$now"
  fi
  case "$now" in
    *JobState=COMPLETED* | *JobState=FAILED* | *JobState=CANCELLED* | *JobState=TIMEOUT*) break ;;
  esac
  if [ -z "$other" ] && grep -q "\"step\": ${step}[,}]" "$folder/run/metrics.jsonl" 2> /dev/null; then
    other="$(sbatch --parsable --partition=high --ntasks-per-node=2 --output="$folder/other.log" \
      --wrap='date +%T; sleep 5; date +%T')"
    echo "$((SECONDS - began)) s: job $other of partition high is submitted" | tee -a "$folder/states"
  fi
  sleep 0.5
done
cat "$folder/job.log"
[[ "$now" = *JobState=COMPLETED* ]]
