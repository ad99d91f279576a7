"""What `phi4 demo` runs, above all with --post-training, and the figures that it ends with."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from phi4.cli import demo, demo_figures, make_app
from phi4.cli.demo_post_training import ChainSettings, StageFigures
from phi4.config import check, load_recipe
from phi4.stages import stage_of
from tests.support.planned_demo import (
    BEST,
    even_score,
    planned_commands,
    planned_sections,
)

Plan = Callable[..., list[list[str]]]

SHARES = {"base": 0.4, "sft": 0.5, "dpo_pivotal": 0.7, "dpo_judge": 0.8, "dpo_judge_only": 0.6}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The commands of a chain, none of which is run."""

    def commands(**settings: object) -> list[list[str]]:
        return planned_commands(ChainSettings(**settings), monkeypatch)

    return commands


def recipes_of(commands: list[list[str]]) -> Mapping[str, object]:
    """Recipes that the chain trains, by run.dir."""
    trained = [words[1:] for words in commands if words[0] == "train"]
    found = [load_recipe(words[0], words[1:]) for words in trained]
    return {Path(recipe.run.dir).name: recipe for recipe in found}


@pytest.mark.parametrize("out", ["runs/reasoning", "/elsewhere/x y"])
def test_every_stage_goes_on_with_the_best_of_the_one_before(planned: Plan, out: str) -> None:
    ran = planned(out=Path(out), seed=7)
    recipes = recipes_of(ran)
    origins = {"sft": "base", "dpo_pivotal": "sft", "dpo_judge": "dpo_pivotal"}
    origins["dpo_judge_only"] = "sft"
    assert recipes.keys() == {"base", *origins}
    for name, recipe in recipes.items():
        check(recipe, stage_rules=[stage_of(recipe).violations])
        assert recipe.run.seed == 7
        assert recipe.run.dir == f"{out}/{name}"
        selected = "" if name in ("base", "sft") else f"/{BEST}"
        expected = f"{out}/{origins[name]}{selected}" if name in origins else None
        assert recipe.run.init_from == expected
        assert all(source.path.startswith(f"{out}/data/") for source in recipe.data.sources)
    caches = [recipes[name].data.reference_cache for name in recipes if name.startswith("dpo")]
    assert len(set(caches)) == 3 and all(str(one).startswith(out) for one in caches)
    # The reference is computed for the recipe that is then trained.
    for words in ran:
        if words[:2] == ["dpo", "cache-ref"]:
            assert ["train", *words[2:]] in ran


def test_questions_of_a_stage_are_used_by_no_other(planned: Plan) -> None:
    ran = planned()
    uses: dict[str, set[str]] = {}
    for words in ran:
        for word in words:
            if word.startswith("--questions="):
                uses.setdefault(Path(word).stem, set()).add(" ".join(words[:2]))
    assert uses == {
        "sft": {"answers draw"},
        "search": {"pts search"},
        "judge": {"answers draw"},
        "stop": {"pts select"},
        "test": {"answers draw"},
    }
    # The test questions are asked once per stage and temperature, when the stage has ended.
    tests = [shlex.join(words) for words in ran if any("data/test.jsonl" in w for w in words)]
    assert len(tests) == len(set(tests)) == 2 * 5


def test_draws_depend_on_the_seed(planned: Plan) -> None:
    ran = planned(seed=7)
    for words in ran:
        if words[:2] in (["answers", "draw"], ["pts", "search"], ["pts", "select"]):
            assert "--seed=7" in words


def test_overrides_reach_all_recipes(planned: Plan) -> None:
    ran = planned(overrides=("run.steps=2", "parallel.data=1"))
    recipes = recipes_of(ran)
    assert {recipe.run.steps for recipe in recipes.values()} == {2}
    assert {recipe.parallel.data for recipe in recipes.values()} == {1}
    longer = recipes_of(planned(base_overrides=("run.steps=3",)))
    assert [name for name, recipe in longer.items() if recipe.run.steps == 3] == ["base"]


def test_commands_are_spelled_as_they_are_parsed(planned: Plan) -> None:
    for words in planned(seed=7, num_operators=4, precedence_error=0.3, scale=0.5):
        command, left = get_command(make_app(words[:1])), list(words)
        while isinstance(command, TyperGroup):
            command, left = command.commands[left[0]], left[1:]
        # An option or argument that it lacks is an error.
        command.make_context("phi4", left)


def numbers_of(headings: list[str]) -> list[str]:
    """The first words of headings, if they are the numbers that they should be."""
    expected = [f"{i}/{len(headings)}" for i in range(1, len(headings) + 1)]
    assert [heading.split()[0] for heading in headings] == expected
    return expected


def test_every_command_has_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numbers_of([why for why, _ in planned_sections(ChainSettings(), monkeypatch)])
    headings: list[str] = []
    monkeypatch.setattr(demo, "run_phi4", lambda why, *words: headings.append(why))
    monkeypatch.setattr(demo, "_draw", lambda run: tmp_path)
    monkeypatch.setattr(demo, "_conclude", lambda *arguments: 1.0)
    demo._pretrain(tmp_path, None)
    assert numbers_of(headings)[-1] == "7/7"


def figures() -> list[StageFigures]:
    names = {"base": "base", "SFT": "sft", "DPO 1": "dpo_pivotal"}
    names |= {"DPO 2 only": "dpo_judge_only", "DPO 1 + 2": "dpo_judge"}
    return [
        StageFigures(
            name, Path(f"runs/{run}"), even_score(SHARES[run]), even_score(SHARES[run] + 0.1)
        )
        for name, run in names.items()
    ]


def test_table_and_picture(tmp_path: Path) -> None:
    lines = list(demo_figures.table(figures()))
    assert lines[1].split("  ")[0] == "" and lines[1].split()[:2] == ["base", "SFT"]
    assert [line.split()[0] for line in lines[2:4]] == ["sampled", "greedy"]
    assert lines[2].count("± 0.017") == 5
    assert "0.800 ± 0.017" in lines[2] and "0.900 ± 0.017" in lines[3]
    # The second round alone is no step of the chain.
    gains = [line.split(" ± ")[0].split() for line in lines[5:]]
    assert gains == [["SFT", "+0.100"], ["DPO", "1", "+0.200"], ["DPO", "1", "+", "2", "+0.100"]]
    drawn = demo_figures.picture(figures(), tmp_path / "stages.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    row = demo_figures.figures_row(ChainSettings(seed=3), figures())
    assert row["seed"] == 3 and row["stages"]["DPO 1"]["sampled"]["mean"] == pytest.approx(0.7)


@pytest.mark.parametrize("in_terminal", [True, False])
def test_demo_ends_in_a_conversation_where_somebody_can_hold_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_terminal: bool
) -> None:
    score, ran = even_score(0.5), []
    figures = [
        StageFigures(name, tmp_path / name, score, score)
        for name in ("base", "SFT", "DPO 1", "DPO 2 only", "DPO 1 + 2")
    ]
    monkeypatch.setattr(demo_figures, "run_chain", lambda settings: figures)
    monkeypatch.setattr(demo_figures, "run_phi4", lambda why, *words: ran.append(words))
    for stream in ("stdin", "stdout"):
        terminal = type("Stream", (), {"isatty": lambda self: in_terminal})()
        monkeypatch.setattr(demo_figures.sys, stream, terminal)
    monkeypatch.setattr(demo_figures.typer, "echo", lambda text: None)
    monkeypatch.setattr(demo_figures.typer, "secho", lambda text, bold: None)
    demo_figures.post_train(ChainSettings(out=tmp_path), None)
    assert ran == ([("chat", tmp_path / "DPO 1 + 2")] if in_terminal else [])
