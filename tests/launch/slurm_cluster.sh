#!/usr/bin/env bash
# Runs a command in a Slurm cluster of its own: one node with two tasks, on this machine.
# Usage: slurm_cluster.sh FOLDER COMMAND..     FOLDER takes the cluster's files and logs.
# The partition `high` preempts jobs of `low`, the default, which are told 120 s before and requeued.
# Needs slurmctld, slurmd and munged, and no service manager.
set -euo pipefail
mkdir -p "$1/state" "$1/spool"
folder="$(cd "$1" && pwd)"
shift
PATH="$PATH:/usr/sbin"
export SLURM_CONF="$folder/slurm.conf"
user="$(id -un)" node="$(hostname -s)"
free_ports='
import socket
sockets = [socket.create_server(("", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))'
read -r controller_port node_port <<< "$(python3 -c "$free_ports")"
cat > "$SLURM_CONF" << CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=$user
SlurmdUser=$user
# JAX chooses the port at which processes meet by the number of the job, modulo 4096; two clusters
# on one machine must not have the same numbers.
FirstJobId=$((RANDOM % 4000 + 1))
AuthType=auth/munge
# A requeued job waits for as long as its old credentials are good: 120 s by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=15
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=$node Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=$node PriorityTier=10 PreemptMode=OFF
CONF
printf 'CgroupPlugin=cgroup/v1\n' > "$folder/cgroup.conf"
(umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")

daemons=()
end() {
  trap - EXIT
  scancel --user="$user" --signal=KILL --full 2> /dev/null || :
  scancel --user="$user" 2> /dev/null || :
  for _ in $(seq 60); do
    [ -n "$(squeue --noheader 2> /dev/null)" ] || break
    sleep 1
  done
  kill "${daemons[@]}" 2> /dev/null || :
  wait || :
}
trap end EXIT
trap 'exit 143' TERM INT
chmod 755 "$folder"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" > "$folder/munged.log" 2>&1 &
daemons+=($!)
slurmctld -D -c -f "$SLURM_CONF" > "$folder/slurmctld.log" 2>&1 &
daemons+=($!)
slurmd -D -f "$SLURM_CONF" > "$folder/slurmd.log" 2>&1 &
daemons+=($!)
for _ in $(seq 60); do
  if sinfo --noheader --format=%T 2> /dev/null | grep -q idle; then break; fi
  sleep 1
done
sinfo --noheader --format=%T 2> /dev/null | grep -q idle || {
  tail -n 20 "$folder"/*.log >&2
  exit 1
}
"$@"
