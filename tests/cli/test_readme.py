"""README and the laptop tutorial as a reader types them: one fresh directory, block after block.

`make demo` and `make test` themselves are what CI runs; here the demo is its corpus and two steps.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from inspect import signature
from io import StringIO
from pathlib import Path

import mlflow
import pytest

from phi4.cli import data, demo, main
from phi4.config import load_recipe
from phi4.errors import Phi4Error
from phi4.rundir.step_log import read_metrics
from tests.support import pages
from tests.support.pages import ROOT, TUTORIALS, Block

README = ROOT / "README.md"
LAPTOP = ROOT / "docs/tutorials/laptop.md"
RECIPES = sorted((ROOT / "examples/recipes").glob("*.toml"))
MANUAL_AT_MOST = 3
MAKE = "make demo\nmake test\n"
FOLDERS = "benchmarks|constraints|csrc|docs|examples|kernels|phi4|tests|tools"
PORT, STEPS = "5000", "run.steps=2"
# Training waits half a minute for a server, which a busy machine may take longer for.
SETTLE = "\nphi4 track settle runs/mlflow"
WAIT = "until curl --silent --fail http://localhost:{port}/health >/dev/null; do sleep 0.2; done\n"


def wrong_marks(blocks: list[Block]) -> list[str]:
    """What is wrong with the marks of a page's blocks."""
    found = [
        f"{block.mark or 'no mark'}: {block.text.splitlines()[0]}"
        for block in blocks
        if not re.fullmatch(r"replay|plan-only|manual: \S.*", block.mark)
    ]
    manual = sum(block.mark.startswith("manual") for block in blocks)
    return found + [f"{manual} manual blocks"] * (manual > MANUAL_AT_MOST)


def test_every_block_of_readme_is_marked() -> None:
    assert wrong_marks(pages.blocks(README)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```\nls\n```", ["no mark: ls"]),
        ("<!-- replay -->\n\n```\nls\n```", ["no mark: ls"]),
        ("<!-- later -->\n```\nls\n```", ["later: ls"]),
        ("<!-- manual: -->\n```\nls\n```", ["manual:: ls"]),
        ("<!-- manual: GPU -->\n```bash\nls\n```\n" * 3, []),
        ("<!-- manual: GPU -->\n```bash\nls\n```\n" * 4, ["4 manual blocks"]),
    ],
)
def test_planted_mark_is_found(tmp_path: Path, text: str, found: list[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"text\n\n{text}\n")
    assert wrong_marks(pages.blocks(page)) == found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page and words of every `phi4` command in a block of README or a tutorial."""
    for page in (README, *TUTORIALS):
        for block in pages.blocks(page):
            if block.language in ("", "bash"):
                for line in block.commands:
                    # What comes behind || is for a command that is meant to fail.
                    if (words := pages.phi4_words(line)) and "||" not in line:
                        yield page.name, words


@pytest.mark.parametrize(("page", "words"), list(commands()))
def test_command_of_a_page_parses(page: str, words: list[str]) -> None:
    pages.parse_command(words)


def test_commands_are_found_in_every_page() -> None:
    with_commands = {page for page, _ in commands()}
    assert with_commands == {page.name for page in (README, *TUTORIALS)}


@pytest.mark.parametrize(
    "line",
    [
        "phi4 trian examples/recipes/tiny_pretrain.toml",
        "phi4 train examples/recipes/tiny_pretrain.toml --wrong",
        "A=1 .venv/bin/phi4 train examples/recipes/none.toml 2>log &",
        "phi4 train examples/recipes/tiny_pretrain.toml run.stepz=1 # why",
        "echo a | phi4 chat runs/a --max-tokens x",
        "phi4 data nope",
    ],
)
def test_planted_command_is_refused(line: str) -> None:
    with pytest.raises(Exception, match=r"trian|wrong|none\.toml|run\.stepz|integer|nope"):
        pages.parse_command(pages.phi4_words(line))


def test_a_shown_output_is_found_whatever_its_numbers_and_a_changed_one_is_not() -> None:
    printed = (
        "resumed from a/step_0000040 (step 40)\nloss -1.5e-03 nats, 1,200 tokens/s\nsaved b (why)\n"
    )
    assert pages.missing_lines("resumed from a/step_1 (step 1)\n...\nsaved b\n", printed) == []
    assert pages.missing_lines("loss 3 nats, 7 tokens/s\n", printed) == []
    assert pages.missing_lines("saved b\nloss 3 nats\n", printed) == ["loss 3 nats"]
    assert pages.missing_lines("loss 3 bits\n", printed) == ["loss 3 bits"]


@pytest.mark.parametrize("page", [README, *TUTORIALS], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w/?)(?![\w<*])", page.read_text(encoding="utf-8")
    )
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_mlflow_block_needs_what_the_demo_leaves_and_no_other_run() -> None:
    (words,) = (words for page, words in commands() if page == "README.md" and words[0] == "train")
    recipe = load_recipe(ROOT / words[1], words[2:])
    made = signature(data.demo).parameters["out"].default
    sources = (*recipe.data.sources, *recipe.data.held_out)
    files = [recipe.tokenizer.path, *(source.path for source in sources)]
    assert {str(Path(file).parent) for file in files} == {made}
    # A directory of its own: another run in it was started with other steps.
    assert recipe.run.dir not in {load_recipe(path).run.dir for path in RECIPES}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `make demo` was run, as far as it goes in two steps."""
    root = tmp_path_factory.mktemp("clone")
    (root / "examples").symlink_to(ROOT / "examples")
    (root / ".venv").symlink_to(sys.prefix)
    (training,) = pages.run(pages.script([pages.SHORT_DEMO]), root)
    (root / "demo.log").write_text(training)
    return root


def conclusion(root: Path) -> str:
    """What the demo prints at its end."""
    printed = StringIO()
    out = root / "runs/demo"
    # Two steps are not what it expects of a demo.
    with redirect_stdout(printed), pytest.raises(Phi4Error, match="nats below"):
        demo._conclude(out / "data", out / "run", out / "run/loss.png", 1.0)
    return printed.getvalue().replace(f"{root}/", "")


@pytest.mark.slow
def test_blocks_of_readme_work_in_their_order(clone: Path) -> None:
    # The port may be taken on this machine, and two steps of the hundred show it.
    port = str(pages.free_port())
    replayed = [block for block in pages.blocks(README) if block.mark == "replay"]
    assert replayed[0].text == MAKE
    parts = [
        "".join(
            f"{line} {STEPS + SETTLE if ' train ' in line else ''}\n".replace(PORT, port)
            + (WAIT.format(port=port) if line.endswith("&") else "")
            for line in block.commands
        )
        for block in replayed
        if block.language != "text" and block.text != MAKE
    ]
    printed = iter(pages.run(pages.script(parts), clone))
    for block, before in zip(replayed, (None, *replayed), strict=False):
        if block.language != "text":
            output = conclusion(clone) if block.text == MAKE else next(printed)
        else:
            assert before is not None and before.language != "text"
            assert pages.missing_lines(block.text, output) == [], output
    client = mlflow.MlflowClient(f"sqlite:///{clone}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'phi4'")
    runs = client.search_runs([experiment.experiment_id])
    (run,) = (found for found in runs if "mlflow.parentRunId" in found.data.tags)
    (model,) = (found for found in runs if found is not run)
    assert run.data.tags["mlflow.parentRunId"] == model.info.run_id
    assert (run.info.run_name, run.info.status) == ("mlflow", "FINISHED")
    assert run.data.params["tracking.uri"] == f"http://localhost:{port}"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == [1, 2]
    (artifacts,) = clone.glob(f"runs/mlartifacts/*/{run.info.run_id}/artifacts")
    assert {path.name for path in artifacts.iterdir()} == {
        "about",
        "checkpoints.json",
        "config.toml",
    }
    # Everything is where git does not look.
    assert {path.name for path in clone.iterdir()} == {".venv", "examples", "runs", "demo.log"}


@pytest.mark.slow
def test_plans_of_readme_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    planned = [block for block in pages.blocks(README) if block.mark == "plan-only"]
    lines = [pages.phi4_words(line) for block in planned for line in block.commands]
    assert len(lines) == sum(len(block.commands) for block in planned) > 0
    for words in lines:
        if words[0] == "plan" or "--dry-run" in words:
            try:
                main(words)
            except SystemExit as end:
                assert not end.code, words
            assert len(capsys.readouterr().out.splitlines()) > 20


@pytest.mark.slow
def test_first_hour_on_a_laptop_is_what_happens(clone: Path) -> None:
    shown = pages.blocks(LAPTOP)
    parts = [block.text for block in shown if block.language == "bash"]
    printed = iter(pages.run(pages.script(parts), clone))
    output = (clone / "demo.log").read_text()
    for block in shown:
        if block.language == "bash":
            output = next(printed)
        elif block.language == "text":
            assert pages.missing_lines(block.text, output) == [], output
    runs = clone / "runs/laptop"
    steps = {
        name: [row["step"] for row in read_metrics(runs / name / "metrics.jsonl")]
        for name in ("rate", "killed")
    }
    # No step is lost and none is counted twice, however the run was ended.
    assert steps == {"rate": list(range(1, 61)), "killed": list(range(1, 121))}
    assert len(list(runs.glob("killed/attempts/*"))) == 2
    assert (runs / "report.html").stat().st_size > 1_000_000
