"""Ranks with other code, packages or another recipe are refused before anything is built."""

from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from phi4.engine.platform import connect, disconnect
from phi4.errors import PlatformError
from phi4.stages.pretrain import NextToken
from phi4.train.reliability import same_start
from phi4.train.reliability.same_start import Program, differences, program_of
from phi4.train.session import run_training
from tests.support.engines import tiny_recipe
from tests.support.ranks import rendezvous, run_ranks

SAME = [Program(rank, f"n{rank // 2}", "c0de", "torch 2", "ec1be") for rank in range(6)]


def changed(rank: int, **fields: str) -> list[Program]:
    return [msgspec.structs.replace(p, **fields) if p.rank == rank else p for p in SAME]


def test_equal_ranks_have_no_differences() -> None:
    assert differences(SAME) == []


@pytest.mark.parametrize("field", ["code", "packages", "recipe"])
def test_the_rank_that_differs_from_most_is_named_with_its_host(field: str) -> None:
    (line,) = differences(changed(0, **{field: "older"}))
    most = getattr(SAME[0], field)
    assert line == f"{field} differs from that of most ranks ({most}) on rank 0 on n0 (older)"


def test_program_follows_recipe_and_code(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    first = program_of(0, recipe)
    assert first == program_of(0, recipe)
    assert first.recipe != program_of(0, tiny_recipe("run.steps=9")).recipe
    (tmp_path / "phi4").mkdir()
    (tmp_path / "phi4/__init__.py").write_text("one = 1\n")
    with patch.object(same_start.importlib.util, "find_spec") as found:
        found.return_value.submodule_search_locations = [str(tmp_path / "phi4")]
        before = program_of(0, recipe).code
        (tmp_path / "phi4/__init__.py").write_text("one = 2\n")
        assert before != program_of(0, recipe).code


def _other_recipe(rank: int, world_size: int, directory: Path) -> tuple[str, bool]:
    recipe = tiny_recipe("parallel.pipeline=2", "run.dir=run", f"run.seed={rank}")
    platform = connect("cpu", rank=rank, world_size=world_size, rendezvous=rendezvous())
    with chdir(directory), patch("phi4.train.session.Engine") as engine:
        try:
            run_training(recipe, platform, NextToken(), allow_change=False)
            return "", False
        except PlatformError as error:
            return str(error), engine.called
        finally:
            disconnect()


def test_run_with_two_recipes_is_refused_by_all_before_the_engine(tmp_path: Path) -> None:
    (first, built), (second, _) = run_ranks(2, _other_recipe, tmp_path)
    assert first == second and not built
    assert first.startswith("recipe differs from that of most ranks (") and "rank 1 on " in first
