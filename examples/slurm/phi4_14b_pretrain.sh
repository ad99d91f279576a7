#!/bin/bash
# Written by phi4 0.1.0: phi4 launch slurm examples/recipes/phi4_14b_pretrain.toml --nodes 240 --partition gpu --time 24:00:00 --setup 'source .venv/bin/activate' --python python
# Submit with `phi4 launch slurm`, which keeps a record, or with sbatch from the same directory.
#SBATCH --job-name=phi4_14b_pretrain
#SBATCH --nodes=240
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/phi4_14b_pretrain/slurm/%j.out
#SBATCH --signal=B:USR1@300

set -uo pipefail  # not -e: every exit code below is looked at

# --- Setup: modules, virtual environment
source .venv/bin/activate

# --- Environment of the ranks; what is set already wins
# Keeps the last output lines of a killed rank.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED-1}
# A crashing rank prints its stack.
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER-1}
# run.threads of the recipe.
export OMP_NUM_THREADS=${OMP_NUM_THREADS-1}
# Micro-batches of several sizes fragment the allocator's fixed segments.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}
# NCCL logs the link and the peer that failed.
export NCCL_DEBUG=${NCCL_DEBUG-WARN}
# The last collectives of each rank, dumped when one times out.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE-2000}
# Tensor and context parallel: communication is queued before the products that it overlaps with
# (Hopper; without effect on Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS-1}

# --- This attempt
run=runs/phi4_14b_pretrain
last_step=423855  # run.steps
job=$SLURM_JOB_ID
max_retries=3  # failures in a row without a newer checkpoint
attempt=${SLURM_RESTART_COUNT:-0}
files=$run/slurm
here=$files/$job.$attempt  # rank_N.log and the exit codes of this attempt
mkdir -p "$here/exit" "$here/ended" || exit 1

say() { echo "$(date -u +%FT%TZ) job $job attempt $attempt: $*"; }

# Step of the newest complete checkpoint; 0 without one.
newest_step() {
    local name
    name=$(cat "$run/checkpoints/latest" 2>/dev/null) || name=step_0
    echo $((10#${name##*_}))
}

# One line of attempts.jsonl, which `phi4 launch history` prints: event, exit code,
# what follows, why.
record() {
    local line='{"job":"%s","attempt":%d,"time":"%s","event":"%s","code":%d,"then":"%s",'
    printf "$line"'"why":"%s","step":%d,"nodes":"%s"}\n' "$job" "$attempt" \
        "$(date -u +%FT%TZ)" "$1" "$2" "$3" "${4//\"/}" "$(newest_step)" "$SLURM_JOB_NODELIST" \
        >>"$files/attempts.jsonl"
}

# End the job with code $1, because $2.
end_job() {
    say "ends with exit code $1 at step $(newest_step): $2"
    record end "$1" end "$2"
    exit "$1"
}

# The run saved and ended because somebody wanted it ($1): neither COMPLETED nor FAILED.
leave_job() {
    say "is cancelled at step $(newest_step): $1"
    record end 0 cancel "$1"
    timeout 60 scancel "$job"
    exit 5  # where Slurm did not answer
}

# Put the job back into the queue while it still runs; afterwards Slurm would refuse. $1: why,
# $2: exit code where that cannot be.
requeue_job() {
    local shown
    shown=$(timeout 30 scontrol show job -o "$job")
    case $shown in
        # After scancel, a kill by preemption, a node that Slurm took away: COMPLETING, whatever
        # follows. Slurm requeues by itself what is to be requeued; a cancelled job stays cancelled.
        *JobState=COMPLETING*Reason=TimeLimit* | *Reason=TimeLimit*JobState=COMPLETING*) ;;
        *JobState=COMPLETING* | *JobState=CANCELLED*) end_job "$2" "$1, and Slurm ends the job" ;;
    esac
    say "requeues at step $(newest_step): $1"
    record end "$2" requeue "$1"
    for _ in 1 2 3; do
        # Slurm ends this script once it has requeued the job.
        timeout 60 scontrol requeue "$job" && exit "$2"
        sleep 10
    done
    end_job "$2" "scontrol requeue failed three times"
}

# Requeue after a failure ($1: why, $2: exit code), unless failures bring no progress any more.
retry_job() {
    local count=0 file=$files/$job.failures
    [ "$(newest_step)" -gt "$first_step" ] || count=$(($(cat "$file" 2>/dev/null || echo 0) + 1))
    echo "$count" >"$file"
    [ "$count" -le "$max_retries" ] ||
        end_job "$2" "$1; $count failures in a row without a newer checkpoint"
    requeue_job "$1" "$2"
}

# Slurm's notice (preemption, time limit) comes to this script only. The ranks get it, not srun or
# torchrun, which would die of it; they save and leave with code 5.
pass_on_notice() {
    interrupted=yes notified=yes
    say "notice from Slurm; the ranks are told to save"
    timeout 30 scancel --signal=USR1 "$job"  # goes to the job's steps, not to this script
}

# SIGTERM (scancel, preemption without notice) reaches the ranks without our help.
note_term() { interrupted=yes notified=yes; say "SIGTERM from Slurm"; }

# --- One rank: its output and its exit code get files of their own. srun tells only the highest
# code of all ranks, 137 for those that it killed because another failed; torchrun always tells 1.
rank_program=$(cat <<'END'
here=$1; shift
rank=${RANK:-$SLURM_PROCID}
trap : USR1 TERM  # for the training alone
"$@" >"$here/rank_$rank.log" 2>&1
code=$?
[ $code != 0 ] || { touch "$here/ended/$rank"; exit 0; }
# A rank that lost the connection to another is not the one that failed.
lost='onnection (closed|reset|refused)|roken pipe|NCCL error|ncclRemoteError|recvBytes'
if [ $code = 1 ] && tail -n 40 "$here/rank_$rank.log" | grep -qE "$lost"; then
    echo lost >"$here/exit/$rank"
elif echo $code >"$here/exit/$rank" && [ $code = 5 ]; then
    exit 0  # it saved, and others may still be at it: no reason to end them
fi
exit $code
END
)

# --- Start
# The address that Slurm itself uses: node names need not resolve.
first_node=$(timeout 30 scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(timeout 30 scontrol show node -o "$first_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-${address:-$first_node}}
first_step=$(newest_step)
say "starts at step $first_step of $last_step on $SLURM_JOB_NODELIST; output in $here/rank_0.log"
record start 0 train ""

notified=no
trap pass_on_notice USR1
trap note_term TERM
# kill-on-bad-exit: a rank would wait for one that failed until the collective times out.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * 8)) \
    --ntasks-per-node=8 --kill-on-bad-exit=1 \
    bash -c "$rank_program" rank "$here" \
    python -m phi4 train runs/phi4_14b_pretrain/slurm/recipe.toml &
step=$!

# srun waits for a node that is gone as long as Slurm does. Once a rank said why the run ends, the
# others get a minute.
(
    until ls "$here"/exit/* >/dev/null 2>&1; do sleep 5; done
    sleep 60
    say "ranks are still there a minute after the first one failed; not waiting for them"
    kill -KILL "$step"
) &
watch=$!

# A trap ends the wait; srun continues.
while :; do
    interrupted=no
    wait "$step"
    srun_code=$?
    [ $interrupted = yes ] || break
done
kill "$watch" 2>/dev/null

# --- Decide
# Ranks may tell different codes, for one that fails takes the others with it. The first of these
# that any rank told counts; 5 comes early only where Slurm did give notice.
codes=$(cat "$here"/exit/* 2>/dev/null | sort -u)
[ $notified = yes ] && saved=5 || saved=""
code=$srun_code
for known in 137 3 6 8 4 2 7 $saved $(grep -vxE 'lost|5|138|143' <<<"$codes") lost 5 138 143; do
    if grep -qx "$known" <<<"$codes"; then code=$known; break; fi
done

case $code in
    0)
        [ "$(newest_step)" -lt "$last_step" ] || end_job 0 "finished"
        # srun ends with 0, too, when Slurm takes its step away before a rank can say anything.
        if ! ls "$here"/ended/* >/dev/null 2>&1; then
            [ $notified = no ] || requeue_job "no rank had time to save" 143
            retry_job "no rank told its end, srun ended with 0" 1
        fi
        leave_job "a file $run/stop or a hook ended the run before step $last_step" ;;
    5 | 138 | 143) requeue_job "saved or stopped after a notice" "$code" ;;
    7) retry_job "a rank hung" 7 ;;
    8) retry_job "a rank computed wrongly; see $here for its host" 8 ;;
    137) retry_job "a rank was killed" 137 ;;
    lost) retry_job "a rank lost another one" 1 ;;
    2 | 3 | 4 | 6) end_job "$code" "see $here/rank_0.log; docs/faults.md explains the code" ;;
    *)
        # No rank said anything: a node was lost, or srun could not start the ranks.
        [ -n "$codes" ] || retry_job "no rank told its end, srun ended with $srun_code" "$code"
        end_job "$code" "failed, see $here" ;;
esac
