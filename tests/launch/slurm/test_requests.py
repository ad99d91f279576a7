"""Before anything is submitted: the text of the script, and refusals in one line."""

import shlex
import subprocess
from pathlib import Path

import pytest

from phi4.cli import main
from phi4.config import Recipe, with_overrides
from phi4.errors import ConfigError, LayoutError, OwnershipError, Phi4Error
from phi4.launch.slurm import (
    NodeRange,
    SlurmRequest,
    limit_seconds,
    rank_settings,
    require_fit,
    require_same_run,
    script_text,
    submission,
)
from phi4.launch.slurm.submission import require_idle, submit
from tests.support.waiting import LONG_SECONDS

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "slurm" / "phi4_14b_pretrain.sh"


def _recipe(*overrides: str) -> Recipe:
    base = ["model.num_layers=4", "batch.global_batch_size=12", "parallel.data=0"]
    return with_overrides(Recipe(), [*base, *overrides])


def _request(run_dir: Path, **fields: object) -> SlurmRequest:
    given = {"nodes": NodeRange(1, 1), "tasks_per_node": 1, **fields}
    return SlurmRequest("phi4 launch slurm", str(run_dir), 10, ("true",), **given)


def test_the_example_is_what_its_command_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command stands in its second line."""
    line = EXAMPLE.read_text().splitlines()[1]
    words = shlex.split(line.partition(": phi4 ")[2])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["phi4", *words])
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--dry-run"])
    assert capsys.readouterr().out == EXAMPLE.read_text()


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
@pytest.mark.parametrize("container", [None, "image.sqsh"])
def test_bash_reads_every_form_of_the_script(
    tmp_path: Path, starter: str, container: str | None
) -> None:
    """And nothing is left to fill in."""
    request = _request(
        tmp_path / "a run", starter=starter, container=container, cpus_per_task=4, setup="true"
    )
    text = script_text(request)
    assert "@{" not in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=LONG_SECONDS)


@pytest.mark.parametrize(
    ("nodes", "fields", "option"),
    [
        (NodeRange(2, 2), {}, "--ntasks-per-node=8"),
        (NodeRange(2, 2), {"starter": "torchrun"}, "--ntasks-per-node=1"),
        (NodeRange(1, 9), {}, "--mincpus=8"),
        (NodeRange(1, 9), {"cpus_per_task": 12}, "--mincpus=96"),
        (NodeRange(1, 9), {"cpus_per_task": 96, "starter": "torchrun"}, "--mincpus=96"),
    ],
)
def test_a_range_of_nodes_is_not_cut_to_the_tasks_of_the_fewest(
    tmp_path: Path, nodes: NodeRange, fields: dict, option: str
) -> None:
    """Eight tasks on each of one to nine nodes are eight tasks for sbatch: at most eight nodes."""
    text = script_text(_request(tmp_path, nodes=nodes, **{"tasks_per_node": 8, **fields}))
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [line for line in asked if "ntasks" in line or "mincpus" in line] == [
        f"#SBATCH {option}"
    ]


def test_one_queue_only_where_the_layout_hides_communication() -> None:
    """CUDA_DEVICE_MAX_CONNECTIONS=1 slows a layout without tensor and context parallelism."""
    plain, split = _recipe(), _recipe("parallel.tensor=2")
    names = [{s.name for s in rank_settings(r, on_gpus=True)} for r in (plain, split)]
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in names[0]
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in names[1]
    assert not any("NCCL" in s.name for s in rank_settings(split, on_gpus=False))


@pytest.mark.parametrize(
    ("nodes", "overrides", "said"),
    [
        ("4-6", [], "--nodes=4-6 may give 5 nodes of 1 ranks"),
        ("5", [], "these numbers of nodes work: 1, 2, 3, 4, 6, 12"),
        ("2-3", ["parallel.data=2"], "parallel.data=0 uses all available nodes"),
        ("3", ["parallel.pipeline=2"], "these numbers of nodes work: 2, 4, 6, 8, 12, 24"),
    ],
)
def test_every_number_of_nodes_must_share_out_the_batch(
    nodes: str, overrides: list[str], said: str
) -> None:
    """Else a requeue on fewer nodes would end with code 2, at night."""
    with pytest.raises(LayoutError) as refused:
        require_fit(_recipe(*overrides), NodeRange.parse(nodes), 1)
    assert said in str(refused.value)
    require_fit(_recipe(), NodeRange.parse("1-4"), 1)


@pytest.mark.parametrize("text", ["0", "3-2", "two", "1-", ""])
def test_counts_of_nodes(text: str) -> None:
    """What is none is refused."""
    with pytest.raises(ConfigError, match="is not a count"):
        NodeRange.parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-00", 172800), ("1-02:03:04", 93784)],
)
def test_time_limits(text: str, seconds: int) -> None:
    """In all of Slurm's forms."""
    assert limit_seconds(text) == seconds
    with pytest.raises(ConfigError, match="is not a time limit"):
        limit_seconds(f"{text}x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time", "5"], "--time=5 leaves nothing before the notice of --signal-seconds=300"),
        (["--signal-seconds", "60"], "is less than reliability.stop_seconds=240"),
        (["--nodes", "x"], "--nodes=x is not a count"),
        ([], "sbatch is not on PATH; run this on a login node"),
    ],
)
def test_refused_in_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With exit code 2, and nothing is written."""
    recipe = str(ROOT / "examples" / "recipes" / "tiny_pretrain.toml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    layout = ["--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "4"]
    with pytest.raises(SystemExit, match="2"):
        main(["launch", "slurm", recipe, *layout, *words])
    [line] = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


class _Submitted:
    """A run that was submitted once, on a Slurm whose answers are given."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.state = "COMPLETED"
        monkeypatch.setattr(submission.clients, "call", self._answer)
        submit(_request(run_dir), _recipe())

    def _answer(self, *words: str, **_: float) -> str:
        self.calls.append(words)
        if words[0] == "sbatch":
            return "12\n"
        return f"JobId={words[-1]} JobState={self.state} Restarts=0 ExitCode=0:0"


def test_a_changed_recipe_is_shown_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free keys are shown, schedule keys want --change, identity keys another directory."""
    _Submitted(tmp_path, monkeypatch)
    run_dir, lines = str(tmp_path), []
    require_same_run(run_dir, _recipe(), allow=False, say=lines.append)
    assert lines == []
    require_same_run(run_dir, _recipe("run.threads=2"), allow=False, say=lines.append)
    assert lines == ["free      run.threads: 1 -> 2"]
    longer = _recipe("run.steps=200")
    with pytest.raises(ConfigError, match=r"run\.steps differs .* pass --change"):
        require_same_run(run_dir, longer, allow=False, say=lines.append)
    require_same_run(run_dir, longer, allow=True, say=lines.append)
    with pytest.raises(ConfigError, match=r"model\.num_layers differs .* another run.dir"):
        require_same_run(run_dir, _recipe("model.num_layers=2"), allow=True, say=lines.append)


def test_a_run_has_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGNALING, COMPLETING and the like are passing states of a job that lives."""
    submitted = _Submitted(tmp_path, monkeypatch)
    require_idle(str(tmp_path))
    for state in ("PENDING", "RUNNING", "SIGNALING", "COMPLETING"):
        submitted.state = state
        with pytest.raises(OwnershipError, match=f"job 12 .* is {state}"):
            require_idle(str(tmp_path))
    submitted.state = "FAILED"
    (tmp_path / "stop").touch()
    with pytest.raises(Phi4Error, match="stop exists"):
        require_idle(str(tmp_path))
