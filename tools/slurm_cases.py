"""Disturb the job of a run on a real Slurm cluster, and check the outcome of each case.

python -m tools.slurm_cases [--only preempt_notice ...] [--json benchmarks/slurm_cases.jsonl]

A private cluster of two nodes is brought up for each case, and `phi4 train` runs on it as
`phi4 launch slurm` submits it: two ranks, one per node. The verdict of a case is its final state,
that it never was COMPLETED before its last step, and what it lost: at most one step with a notice,
at most checkpoint.every without. A run whose layout changes is compared with an undisturbed one.
Exit code 1 when a verdict is wrong.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from phi4.launch.slurm import JobAttempt, attempts
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint, step_of
from phi4.verify.measured_rows import append_row, provenance
from tools.slurm_case_run import CaseRun, SlurmCase, wait_for
from tools.slurm_cluster import SlurmCluster, slurm_cluster
from tools.slurm_undisturbed import Comparison, compared

ROOT = Path(__file__).parents[1]
EVERY = SlurmCase.every


def lose(node: str) -> Callable[[CaseRun], None]:
    """The node's daemons and ranks die at once, and it comes back once Slurm has seen that."""

    def disturb(run: CaseRun) -> None:
        run.cluster.send(node, signal.SIGKILL)
        wait_for(lambda: run.state().restarts > 0, "the requeue after the loss of a node")
        run.cluster.restart(node)

    return disturb


def lose_for_good(run: CaseRun) -> None:
    """The second node is lost and stays down."""
    run.cluster.send("n2", signal.SIGKILL)


def change_layout(run: CaseRun) -> None:
    """The run saves and is cancelled; then it is submitted again, tensor for pipeline parallel."""
    run.phi4("launch", "cancel", "run", "--save")
    wait_for(lambda: not run.state().is_active, "the end of the cancelled job")
    if run.state().state != "CANCELLED":
        raise RuntimeError(f"job {run.job} is {run.state().state}, not CANCELLED")
    run.submit("parallel.pipeline=1", "parallel.tensor=2")


def silence(run: CaseRun) -> None:
    """The second node stops without closing a connection; it comes back after the requeue."""
    run.cluster.send("n2", signal.SIGSTOP)
    wait_for(run.has_asked_for_requeue, "the requeue after a node went silent")
    run.cluster.send("n2", signal.SIGKILL)
    run.cluster.restart("n2")


def never_starts(run: CaseRun) -> None:
    """The second node takes no task: its daemon is stopped before the submission."""
    run.cluster.send("n2", signal.SIGSTOP)


def recover(run: CaseRun) -> None:
    """End of `never_starts`: the node answers again after the first requeue."""
    wait_for(run.has_asked_for_requeue, "the requeue after a node that did not start")
    run.cluster.send("n2", signal.SIGCONT)


CASES: dict[str, SlurmCase] = {
    # slurmd waits 5 s between SIGTERM and SIGKILL at least; a step takes longer than that.
    "preempt_grace_0": SlurmCase(
        CaseRun.blocker,
        "COMPLETED",
        may_lose=2,
        must_lose=1,
        grace_seconds=0,
        kill_wait_seconds=0,
        overrides=("batch.global_batch_size=2048",),
        at_step=3,
        steps=4,
        every=2,
    ),
    "preempt_notice": SlurmCase(
        CaseRun.blocker,
        "COMPLETED",
        may_lose=1,
        shown="FINISHED in 1 run; attempt 1 interrupted, preempted: True; 2 nodes sampled",
    ),
    "preempt_term": SlurmCase(
        CaseRun.blocker, "COMPLETED", may_lose=1, options=("--signal-seconds", "0")
    ),
    "lose_first_node": SlurmCase(lose("n1"), "COMPLETED", may_lose=EVERY),
    "lose_other_node": SlurmCase(lose("n2"), "COMPLETED", may_lose=EVERY),
    "scancel": SlurmCase(
        lambda run: run.cluster.call("scancel", run.job),
        "CANCELLED",
        None,
        1,
        restarts=0,
        shown="KILLED in 1 run; attempt 1 interrupted, preempted: False; 2 nodes sampled",
    ),
    "time_limit": SlurmCase(
        lambda run: None,
        "COMPLETED",
        may_lose=1,
        options=("--time", "2", "--signal-seconds", "25"),
        # They have to take more than the 95 s until the notice.
        steps=1200,
    ),
    "unresolvable_name": SlurmCase(
        lambda run: None,
        "FAILED",
        "2:0",
        restarts=0,
        at_step=0,
        environment={"MASTER_ADDR": "no-such-host.invalid"},
        says="no-such-host.invalid",
    ),
    "node_never_starts": SlurmCase(
        never_starts, "COMPLETED", at_step=0, says="n2", slurmd_timeout=300
    ),
    # Not Slurm but the watchdog of the other ranks is to notice it.
    "silent_node": SlurmCase(silence, "COMPLETED", may_lose=EVERY, slurmd_timeout=300),
    "fewer_nodes": SlurmCase(
        lose_for_good,
        "COMPLETED",
        may_lose=EVERY,
        nodes="1-2",
        overrides=("parallel.pipeline=1", "parallel.data=0", "checkpoint.keep=100"),
        undisturbed=("parallel.data=2",),
        ends_on="n1",
    ),
    "another_layout": SlurmCase(
        change_layout,
        "COMPLETED",
        restarts=0,
        overrides=("checkpoint.keep=100",),
        undisturbed=(),
        says="parallel.tensor: 1 -> 2",
    ),
}


def run_case(name: str, cluster: SlurmCluster, recipe: str) -> dict[str, object]:
    """Run a case to its end; gives its row."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="phi4case") as place:
        root = Path(place)
        (root / "recipe.toml").write_text(recipe)
        run = CaseRun(cluster, root, case)
        if case.undisturbed is not None:
            run.phi4("train", "recipe.toml", "run.dir=undisturbed", *case.undisturbed)
        if case.at_step == 0:
            case.disturb(run)
        run.submit()
        begun = time.monotonic()
        if case.at_step:
            wait_for(lambda: run.newest_recorded_step() >= case.at_step, "the first steps")
            begun = time.monotonic()
            case.disturb(run)
        if case.disturb is never_starts:
            recover(run)
        return _row(name, run, begun)


def _row(name: str, run: CaseRun, begun: float) -> dict[str, object]:
    wait_for(lambda: not run.state().is_active, f"the end of job {run.job}")
    told_after = round(run.told_at - begun, 1) if run.told_at and run.lost else None
    state, all_of_them = run.state(), attempts(run.run_dir)
    lost = _steps_lost(run)
    against = None
    if run.case.undisturbed is not None:
        against = compared(run.root / "undisturbed", run.run_dir)
    wrong = _wrong(run, all_of_them, lost, against)
    shown = shown_in_mlflow(run.run_dir)
    if case_shown := run.case.shown:
        wrong += [f"MLflow: {shown}"] if shown != case_shown else []
    if wrong:
        print(run.output(), file=sys.stderr)
    return {
        "benchmark": "slurm_case",
        "case": name,
        "state": state.state,
        "exit_code": state.exit_code,
        "restarts": state.restarts,
        "attempts": [_attempt_text(attempt) for attempt in all_of_them],
        "steps_lost": lost,
        "mlflow": shown,
        **({} if against is None else vars(against)),
        "seconds_to_requeue": told_after,
        "seconds_to_end": round(time.monotonic() - begun, 1),
        "passed": not wrong,
        "wrong": ", ".join(wrong),
    }


def _wrong(
    run: CaseRun, all_of_them: Sequence[JobAttempt], lost: int, against: Comparison | None
) -> list[str]:
    """Return what the verdict finds wrong; empty for nothing."""
    state, case, last = run.state(), run.case, all_of_them[-1]
    last_step = last.end.step if last.end else 0
    found = [
        why
        for why, is_wrong in (
            (f"state {state.state}", state.state != case.state),
            (f"exit code {state.exit_code}", case.exit_code not in (None, state.exit_code)),
            (f"{state.restarts} restarts", state.restarts < case.restarts),
            (f"{lost} steps lost", not case.must_lose <= lost <= case.may_lose),
            ("completed early", state.state == "COMPLETED" and last_step < case.steps),
            (f"{case.says} is not named", case.says not in run.output()),
            (f"ends on {last.start.nodes}", case.ends_on not in ("", last.start.nodes)),
        )
        if is_wrong
    ]
    if against is not None and (differs := against.wrong(last.start.step)):
        found.append(differs)
    return found


def shown_in_mlflow(run_dir: Path) -> str:
    """`KILLED in 1 run; attempt 1 interrupted, preempted: False; 2 nodes sampled`; settles it."""
    import mlflow

    from phi4.rundir.attempts import attempt_path, read_attempt
    from phi4.rundir.mlflow_ids import read_mlflow_ids
    from phi4.track.mlflow import settle

    settle(run_dir, lambda text: print(text, file=sys.stderr))
    ids = read_mlflow_ids(run_dir)
    client = mlflow.MlflowClient(ids.uri)
    run = client.get_run(ids.run_id)
    children = "tags.`mlflow.parentRunId` LIKE '%'"
    count = len(client.search_runs([ids.experiment_id], filter_string=children))
    first = read_attempt(attempt_path(run_dir, 1))
    nodes = {key.split("/")[1] for key in run.data.metrics if key.startswith("system/")}
    return (
        f"{run.info.status} in {count} run{'s' if count > 1 else ''}; attempt 1 "
        f"{first.outcome or 'killed'}, preempted: {first.preempted}; {len(nodes)} nodes sampled"
    )


def _attempt_text(attempt: JobAttempt) -> str:
    """`n[1-2] from step 0: exit code 137, requeue at step 10`."""
    begun = f"{attempt.start.nodes} from step {attempt.start.step}"
    if attempt.end is None:
        return f"{begun}: killed"
    return f"{begun}: exit code {attempt.end.code}, {attempt.end.then} at step {attempt.end.step}"


def _steps_lost(run: CaseRun) -> int:
    """Return the most of any restart; without one, what the newest checkpoint lacks."""
    if run.lost:
        return max(run.lost)
    checkpoint = latest_checkpoint(checkpoints_dir(run.run_dir))
    return run.newest_recorded_step() - (step_of(checkpoint) if checkpoint else 0)


def recipe_text(case: SlurmCase, data: Path) -> str:
    """Return a pipeline of two ranks, a layer each, on the demo's corpus."""
    from phi4.config import dump_toml, load_recipe

    tiny = ROOT / "examples" / "recipes" / "tiny_pretrain.toml"
    recipe = load_recipe(
        tiny,
        [
            "run.dir=run", f"run.steps={case.steps}", f"checkpoint.every={case.every}",
            "parallel.tensor=1", "parallel.pipeline=2", "parallel.sequence=false",
            "model.num_layers=2", "evaluation.every=0", "reliability.silence_seconds=20",
            "reliability.stop_seconds=20", *case.overrides,
        ],
    )  # fmt: skip
    return dump_toml(recipe).replace('"runs/demo/data', f'"{data}')


def run_cases(names: Sequence[str], data: Path, json_file: Path | None) -> list[dict[str, object]]:
    """Return the rows of the cases, printed as they come."""
    rows = []
    # Before the first row, which makes the checkout differ from its commit.
    commit = provenance()["commit"]
    for name in names:
        # A cluster each: what one case leaves drained or down is no part of the next.
        with tempfile.TemporaryDirectory(prefix="slurm") as place:
            Path(place).chmod(0o711)
            case = CASES[name]
            with slurm_cluster(
                Path(place) / "c",
                grace_seconds=case.grace_seconds,
                kill_wait_seconds=case.kill_wait_seconds,
                slurmd_timeout=case.slurmd_timeout,
            ) as cluster:
                row = run_case(name, cluster, recipe_text(case, data))
        rows.append(row)
        if json_file:
            append_row(json_file, {"commit": commit, **row})
        print(msgspec.json.encode(row).decode(), flush=True)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "demo" / "data")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.data.exists():
        subprocess.run([sys.executable, "-m", "phi4", "data", "demo"], cwd=ROOT, check=True)
    rows = run_cases(arguments.only, arguments.data.resolve(), arguments.json)
    right = sum(bool(row["passed"]) for row in rows)
    print(f"{right} of {len(rows)} cases are right")
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
