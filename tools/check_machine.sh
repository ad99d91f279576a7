#!/bin/sh
# Says whether this machine can run phi4, before anything is installed.
# Prints the Python to use on standard output; on standard error every problem with the command
# that fixes it, and exits 1. Needs nothing but a POSIX shell.
#
# Environment: PYTHON (default: python3), NEED_DISK_GB (5), NEED_MEMORY_GB (6).
set -u

need_disk_gb=${NEED_DISK_GB:-5}
need_memory_gb=${NEED_MEMORY_GB:-6}
meminfo=${MEMINFO:-/proc/meminfo}
cgroup=${CGROUP:-/sys/fs/cgroup}
problems=0
packages=
container='docker run --rm -it -v "$PWD":/phi4 -w /phi4 debian:13 sh -c "apt-get update && apt-get install -y make python3-venv && make demo"'

problem() {
    problems=$((problems + 1))
    printf 'phi4: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '      fix it with:  %s\n' "$2" >&2
}

python_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && python_fits "$candidate"; then
            python=$candidate
            return
        fi
    done
    python=
}

check_platform() {
    system=$(uname -s)
    machine=$(uname -m)
    if [ "$system" != Linux ]; then
        problem "needs Linux (megatron-core has no other wheels), this is $system; on Windows use WSL2, elsewhere a container" "$container"
    elif ! getconf GNU_LIBC_VERSION >/dev/null 2>&1; then
        problem "needs glibc (torch has no wheels for musl), this Linux has another C library" "$container"
    fi
    case $machine in
    x86_64 | aarch64 | arm64) ;;
    *) problem "needs x86_64 or aarch64, this is $machine; use another machine" ;;
    esac
}

check_python() {
    find_python
    if [ -z "$python" ]; then
        if command -v "${PYTHON:-python3}" >/dev/null; then
            found=$("${PYTHON:-python3}" -V 2>&1)
            problem "needs Python 3.11 to 3.13, ${PYTHON:-python3} is $found; name another with PYTHON=..., or use a container" "$container"
        else
            problem "needs Python 3.11 to 3.13, there is no ${PYTHON:-python3}"
            packages="$packages python3 python3-venv"
        fi
    elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        problem "$python cannot make virtual environments (no venv with ensurepip)"
        packages="$packages ${python##*/}-venv"
    fi
}

check_disk() {
    free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
    if [ "$free_kb" -lt $((need_disk_gb * 1000000)) ]; then
        problem "needs $need_disk_gb GB of free disk here, $((free_kb / 1000000)) GB are free; free some, or clone to another disk"
    fi
}

check_memory() {
    free_kb=$(awk '$1 == "MemAvailable:" {print $2}' "$meminfo")
    for limit in "$cgroup/memory.max" "$cgroup/memory/memory.limit_in_bytes"; do
        bytes=$(cat "$limit" 2>/dev/null) || continue
        case $bytes in
        '' | *[!0-9]* | ????????????????*) ;; # no limit
        *) [ $((bytes / 1024)) -ge "$free_kb" ] || free_kb=$((bytes / 1024)) ;;
        esac
    done
    if [ "$free_kb" -lt $((need_memory_gb * 1048576)) ]; then
        problem "needs $need_memory_gb GiB of free memory, $((free_kb / 1048576)) GiB are free; close programs, or give the container or WSL2 (memory= in .wslconfig) more"
    fi
}

check_platform
check_python
check_disk
check_memory
if [ -n "$packages" ]; then
    if command -v apt-get >/dev/null; then
        sudo='sudo '
        [ "$(id -u)" -ne 0 ] || sudo=
        command="${sudo}apt-get update && ${sudo}apt-get install -y$packages"
    else
        command=$container
    fi
    printf '      fix it with:  %s\n' "$command" >&2
fi
[ "$problems" -eq 0 ] || exit 1
command -v "$python"
