#!/bin/bash
# Ends what tools/slurm_up.sh started, and what the jobs left, by process id.
#
#   tools/slurm_down.sh DIR
set -uo pipefail
dir=$(readlink -m "${1:?usage: slurm_down.sh DIR}")
[ -d "$dir/pids" ] || exit 0
name=$(sed -n 's/^ClusterName=//p' "$dir/slurm.conf" 2>/dev/null)

# Processes of this cluster: daemons and slurmstepd hold a log of its directory open (slurmstepd
# writes its title over its environment), what jobs run has the cluster's name in its environment.
members() {
    {
        grep -lzxF "SLURM_CLUSTER_NAME=$name" /proc/[0-9]*/environ
        find /proc/[0-9]*/fd -lname "$dir/log/*"
    } 2>/dev/null | cut -d/ -f3 | sort -u
}

# Stopped ones are resumed first: a stopped process does not even see SIGTERM.
daemons=$(cat "$dir"/pids/* 2>/dev/null)
for signal in CONT TERM; do kill -s "$signal" $daemons 2>/dev/null; done
[ -z "$name" ] || for _ in 1 2 3; do
    left=$(members)
    [ -n "$left" ] || break
    kill -s KILL $left 2>/dev/null
    sleep 0.1
done
for _ in $(seq 50); do
    kill -0 $daemons 2>/dev/null || break
    sleep 0.1
done
kill -s KILL $daemons 2>/dev/null
rm -rf "$dir/pids"
true
