#!/bin/bash
# Brings up a private Slurm on this machine: one controller and NODES node daemons, loopback only,
# own munge key, own directory; nothing under /etc is read or written. Any user can run it.
#
#   tools/slurm_up.sh DIR [NODES=2]
#   export SLURM_CONF=DIR/slurm.conf; srun -t 1 -N2 -n2 hostname
#   tools/slurm_down.sh DIR
#
#   GRACE=20     seconds between the notice of a preemption and the kill (partition low)
#   KILL_WAIT=10 seconds between SIGTERM and SIGKILL otherwise; slurmd waits 5 at least
#   SLURMD_TIMEOUT=10  seconds after which a node that does not answer is lost
#   CPUS=2       of each node, invented
#   BASE_PORT=17000   controller; node N listens on BASE_PORT + N
#   OWNER=PID    takes it down when this process is gone, however it ended
# Every user must be able to enter DIR and its parents (chmod o+x), because munge requires it.
# Preemption: a job in partition high takes the nodes of one in partition low.
set -euo pipefail
dir=$(readlink -m "${1:?usage: slurm_up.sh DIR [NODES]}")
nodes=${2:-2}
grace=${GRACE:-20}
kill_wait=${KILL_WAIT:-10}
cpus=${CPUS:-2}
port=${BASE_PORT:-17000}
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin

for program in slurmctld slurmd munged sbatch; do
    command -v "$program" >/dev/null || {
        echo "$program is missing: apt-get install slurmctld slurmd slurm-client munge" >&2
        exit 1
    }
done
if ! me=$(id -un 2>/dev/null); then
    echo "user $(id -u) has no line in /etc/passwd, and Slurm asks for a name; add one" >&2
    exit 1
fi
[ ! -e "$dir/pids" ] || { echo "$dir is in use; tools/slurm_down.sh $dir first" >&2; exit 1; }

mkdir -p "$dir"/{state,log,spool,munge,cgroup,pids}
trap '[ $? = 0 ] || "$here/slurm_down.sh" "$dir"' EXIT

# The name is in the environment of every job, by which slurm_down.sh finds what jobs left.
name=phi4$(printf %s "$dir" | cksum | cut -d' ' -f1)
# Without a configuration in place even --version of the clients fails.
version=$(slurmctld -V | cut -d' ' -f2)
major=${version%%.*}

# munged refuses a key or a directory that others may write to; the clients need to see the socket.
chmod 711 "$dir/munge"
[ -s "$dir/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
munged --foreground --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
    --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" \
    --num-threads=2 >"$dir/log/munged.out" 2>&1 </dev/null &
echo $! >"$dir/pids/munged"
for _ in $(seq 100); do
    [ ! -S "$dir/munge/socket" ] || break
    kill -0 "$(cat "$dir/pids/munged")" 2>/dev/null || break
    sleep 0.1
done
# It refuses, for example, a directory that others may not enter.
[ -S "$dir/munge/socket" ] || { tail -n 1 "$dir/log/munged.out" >&2; exit 1; }

if [ "$major" -ge 23 ]; then
    preempt="PreemptParameters=send_user_signal"
    # No cgroup is touched.
    echo "CgroupPlugin=disabled" >"$dir/cgroup.conf"
else
    preempt="SlurmctldParameters=preempt_send_user_signal"
    # 22.05 knows no `disabled`: with an empty mount point of its own the plugin finds nothing.
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=%s\n' "$dir/cgroup" \
        >"$dir/cgroup.conf"
fi

cat >"$dir/slurm.conf" <<CONF
ClusterName=$name
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its credentials to expire; the default is two minutes.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/state/slurmctld.pid
SlurmdPidFile=$dir/spool/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# CPUs are invented, so that two nodes fit on one machine.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1,defer
ReturnToService=2
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
SlurmctldTimeout=10
MessageTimeout=10
KillWait=$kill_wait
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$preempt
CONF
for number in $(seq 1 "$nodes"); do
    mkdir -p "$dir/spool/n$number"
    echo "NodeName=n$number NodeAddr=127.0.0.1 NodeHostname=localhost Port=$((port + number))" \
        "CPUs=$cpus RealMemory=1000 State=UNKNOWN"
done >>"$dir/slurm.conf"
cat >>"$dir/slurm.conf" <<CONF
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF

export SLURM_CONF=$dir/slurm.conf
# -D: stay in the foreground, so that the pid is the one noted here.
setsid slurmctld -D -f "$SLURM_CONF" >"$dir/log/slurmctld.out" 2>&1 </dev/null &
echo $! >"$dir/pids/slurmctld"
for number in $(seq 1 "$nodes"); do
    setsid slurmd -D -N "n$number" -f "$SLURM_CONF" >"$dir/log/slurmd.n$number.out" 2>&1 </dev/null &
    echo $! >"$dir/pids/n$number"
done

if [ -n "${OWNER:-}" ]; then
    setsid bash -c 'while kill -0 "$1" && [ -d "$3/pids" ]; do sleep 1; done
        exec "$2" "$3"' owner "$OWNER" "$here/slurm_down.sh" "$dir" >/dev/null 2>&1 </dev/null &
fi

# By tries, not by the clock: a busy machine takes longer for each.
for _ in $(seq 150); do
    idle=$(timeout -s KILL 20 sinfo -h -N -p low -o %T 2>/dev/null | grep -c '^idle' || true)
    [ "$idle" != "$nodes" ] || { echo "up: $nodes nodes, Slurm $version, $SLURM_CONF"; exit 0; }
    sleep 0.2
done
echo "the nodes did not come up; the ends of the logs:" >&2
tail -n 5 "$dir"/log/* >&2
exit 1
