"""What `phi4 train` prints besides its steps: a summary, saves in order, the end."""

from pathlib import Path

from tests.support.runs import train_forked as train

ROWS = (
    *("stage", "model", "platform", "layout", "kernels", "precision", "data", "step", "steps"),
    *("start", "run.dir", "MLflow"),
)


def _printed(run: Path) -> list[str]:
    return (run / "stdout.txt").read_text().splitlines()


def _row(lines: list[str], label: str) -> str:
    (row,) = (line for line in lines if line.startswith(f"{label}:"))
    return row.removeprefix(f"{label}:").strip()


def test_summary_names_what_is_trained(run: Path) -> None:
    lines = _printed(run)
    labels = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert labels[: len(ROWS)] == list(ROWS)
    assert _row(lines, "stage") == "pretrain"
    assert _row(lines, "model").startswith("41.6K parameters: 2 layers, hidden 32")
    assert _row(lines, "platform").startswith("cpu over gloo, 1 process (")
    assert _row(lines, "data") == "a 100.0% (of units)"
    assert _row(lines, "step") == "256 tokens (8 rows of 32)"
    assert _row(lines, "steps") == "2; 2 to do, 512 tokens"
    assert _row(lines, "start") == "new run"
    assert _row(lines, "run.dir") == "run"
    assert _row(lines, "MLflow").startswith("off")


def test_summary_fits_80_columns_without_colours(run: Path) -> None:
    text = (run / "stdout.txt").read_text()
    assert "\x1b" not in text
    head = text.partition("step 1/2")[0]
    assert max(map(len, head.splitlines())) <= 80


def test_save_follows_its_step_and_the_end_says_what_is_next(run: Path) -> None:
    last, saved, finished, checkpoint, following = _printed(run)[-5:]
    assert last.startswith("step 2/2  loss ")
    assert saved == "saved run/checkpoints/step_0000002"
    loss = last.split()[3]
    assert finished.startswith("finished: 2 steps, 512 tokens, 0:")
    assert finished.endswith(f"since this start, last loss {loss}")
    assert checkpoint == "checkpoint: run/checkpoints/step_0000002"
    assert following == "next: phi4 report run"


def test_kernels_are_listed_once_in_a_chain_of_runs(run: Path, copy: Path) -> None:
    assert _row(_printed(run), "kernels").startswith("torch (")
    resumed = train(copy, "run.steps=3", "--change").stdout.splitlines()
    assert _row(resumed, "kernels") == "as in run/about/0000001.json"
    words = ("run.init_from=run/checkpoints/step_0000002", "run.steps=1")
    following = train(copy, *words, "run.dir=next").stdout.splitlines()
    assert _row(following, "kernels") == "as in run/about/0000002.json"
    other = train(copy, *words, "run.dir=other", "kernels.rms_norm=torch").stdout.splitlines()
    assert _row(other, "kernels").startswith("torch (")


def test_finished_run_says_so_and_what_to_raise(copy: Path) -> None:
    again = train(copy)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.splitlines() == [
        "already finished: run has all 2 steps (checkpoint of step 2); to train further, raise "
        "run.steps: run.steps=N --change with N > 2"
    ]
