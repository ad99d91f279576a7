"""`run.stage` picks the objective and what is asked of the recipe."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from phi4.cli import main
from phi4.config import Recipe, SourceConfig, check
from phi4.errors import ConfigError, LayoutError
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.step_log import read_metrics
from phi4.stages import STAGES, require_stage, stage_of
from phi4.train.hooks import Hook, Progress
from tests.support.engines import tiny_recipe
from tests.support.in_process import phi4, write_recipe
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def with_source(recipe: Recipe, **options: object) -> Recipe:
    source = SourceConfig(name="s", path="s", **options)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": (source,)})})


def refusal(recipe: Recipe) -> str:
    with pytest.raises(LayoutError) as refused:
        check(recipe, stage_rules=[stage_of(recipe).violations])
    return str(refused.value)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_takes_a_source_and_has_an_objective(name: str) -> None:
    cache = ("data.reference_cache=c",) if name == "dpo" else ()
    recipe = tiny_recipe(f"run.stage={name}", "run.init_from=r", *cache)
    stage = stage_of(recipe)
    for kind in stage.source_kinds:
        check(with_source(recipe, kind=kind), stage_rules=[stage.violations])
    assert callable(stage.make_objective(recipe))


def test_stages_and_their_files_agree() -> None:
    files = {path.stem for path in (ROOT / "phi4/stages").glob("*.py")}
    assert files - {"__init__", "stage"} == STAGES.keys()


def test_unknown_stage_is_one_line_with_the_stages_there_are(
    capsys: pytest.CaptureFixture,
) -> None:
    recipe = str(ROOT / "examples/recipes/tiny_pretrain.toml")
    with pytest.raises(SystemExit) as stop:
        main(["train", recipe, "run.stage=pretraining"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    names = ", ".join(STAGES)
    assert line == f"ConfigError: run.stage='pretraining' is not a stage; use one of {names}"
    with pytest.raises(ConfigError):
        require_stage(tiny_recipe("run.stage=stage"))


def test_source_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = with_source(tiny_recipe(), kind="windows")
    narrow = replace(stage_of(recipe), source_kinds=frozenset(("stream",)))
    monkeypatch.setattr("phi4.stages.pretrain.STAGE", narrow)
    assert refusal(recipe) == (
        "source 's' has kind=windows, but run.stage=pretrain accepts stream; change the kind or "
        "the stage"
    )


def test_loss_head_that_cannot_serve_the_objective_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe("loss_head.form=one_pass")
    check(recipe, stage_rules=[stage_of(recipe).violations])
    monkeypatch.setattr("phi4.stages.pretrain.NextToken.gradient", "any")
    assert "loss_head.form=one_pass" in refusal(recipe)


def test_fp8_is_refused_where_a_reference_is_subtracted() -> None:
    recipe = tiny_recipe(
        *("run.stage=dpo", "run.init_from=r", "data.reference_cache=c", "precision.fp8=torch")
    )
    line = refusal(with_source(recipe, kind="pairs"))
    assert line.startswith("precision.fp8=torch rounds the policy's log-probabilities")
    assert line.endswith("use precision.fp8=off") and "\n" not in line
    tuned = tiny_recipe("run.stage=sft", "run.init_from=r", "precision.fp8=torch")
    tuned = with_source(tuned, kind="conversations")
    check(tuned, stage_rules=[stage_of(tuned).violations])


class Counted(Hook):
    """Adds a number to the record."""

    def measure(self, progress: Progress) -> dict[str, float]:
        return {"counted": 7.0}


def train_with_hook(rank: int, world_size: int, root: Path) -> list[dict[str, float]]:
    from phi4.stages import pretrain

    with patch.object(pretrain, "STAGE", replace(pretrain.STAGE, hooks=(lambda _: [Counted()],))):
        code, printed = phi4(rank, world_size, root, ["train", "recipe.toml"])
    assert code == 0, printed
    return read_metrics(root / "run" / METRICS_FILE)


def test_hooks_of_the_stage_run(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    [[line]] = run_ranks(1, train_with_hook, tmp_path)
    assert line["counted"] == 7.0


def test_midtraining_needs_trained_weights() -> None:
    assert "run.init_from is not set" in refusal(tiny_recipe("run.stage=midtrain"))


SFT = ("run.stage=sft", "run.init_from=r")
DPO = ("run.stage=dpo", "run.init_from=r", "data.reference_cache=c")


@pytest.mark.parametrize(
    ("overrides", "asked", "remedy"),
    [
        (SFT[:1], "run.init_from is not set", "set it to a checkpoint or a run"),
        ((DPO[0], DPO[2]), "run.init_from is not set", "set it to a checkpoint or a run"),
        (DPO[:2], "data.reference_cache is not set", "phi4 dpo cache-ref"),
        (
            (*DPO, "dpo.loss=ipo", "dpo.label_smoothing=0.1"),
            "dpo.label_smoothing=0.1 has no effect with dpo.loss=ipo",
            "use dpo.loss=sigmoid, or 0",
        ),
        ((*DPO, "data.document_mask=false"), "data.document_mask=false lets", "needs true"),
        ((*DPO, "loss_head.form=one_pass"), "loss_head.form=one_pass", "recompute or logits"),
        (
            (*SFT, "dpo.beta=0.5"),
            "dpo.beta=0.5 has no effect with run.stage=sft",
            "remove it, or use run.stage=dpo",
        ),
        (
            (*SFT, "data.reference_cache=x"),
            "data.reference_cache=x has no effect with run.stage=sft",
            "remove it, or use run.stage=dpo",
        ),
        (("dpo.gate=false",), "dpo.gate=False has no effect with run.stage=pretrain", "remove it"),
    ],
)
def test_a_recipe_that_a_stage_cannot_train_is_refused(
    overrides: tuple[str, ...], asked: str, remedy: str
) -> None:
    line = refusal(tiny_recipe(*overrides))
    assert asked in line and remedy in line and "\n" not in line


def test_fine_tuning_refuses_to_cut_conversations() -> None:
    recipe = with_source(tiny_recipe(*SFT), kind="conversations", overlong="cut")
    assert "source 's' has overlong=cut" in refusal(recipe)


def test_fine_tuning_is_served_by_one_pass() -> None:
    recipe = tiny_recipe(*SFT, "loss_head.form=one_pass")
    check(recipe, stage_rules=[stage_of(recipe).violations])


def test_names_of_stages_are_known_without_torch() -> None:
    script = "import sys, phi4.stages; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
