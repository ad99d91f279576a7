"""No document reaches another in any layout, and the check turns red when one does."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from phi4.cli import main, verify_leak
from phi4.config import dump_toml, with_overrides
from phi4.engine.model import micro_batch as placement
from phi4.errors import ConfigError
from phi4.stages.pretrain import NextToken
from phi4.verify.layouts import LEAK_LAYOUTS, LayoutCase, cases, reference_case
from phi4.verify.leak import (
    DOCUMENTS,
    Difference,
    LeakFindings,
    document_columns,
    leak_batch,
    leak_case,
    read_findings,
    run_leak,
)
from phi4.verify.ranks import within_devices
from tests.support.engines import tiny_recipe
from tests.support.ranks import pool_fixture, rendezvous

RECIPE = tiny_recipe("model.num_layers=2", "data.sequence_length=64", "data.unit_tokens=64")
ONE = "one process"
BRIEF = (ONE, "recompute-full", "tp2+sp", "pp2", "cp2", "tp2xcp2+sp", "pp2xcp2-ring+recompute")
"""Every kind of border; test-all runs all layouts, and `make prove-leak` a recipe."""
REST = tuple(name for name in LEAK_LAYOUTS if name not in BRIEF)


def leak_cases(names: tuple[str, ...]) -> list[LayoutCase]:
    possible, impossible = cases(RECIPE, tuple(name for name in names if name != ONE))
    assert not impossible
    reference = [reference_case(RECIPE)] if ONE in names else []
    return [leak_case(case, RECIPE) for case in [*reference, *possible]]


pool = pool_fixture(4)


@pytest.fixture(scope="module")
def work_dir(pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank of the brief layouts saw."""
    directory = tmp_path_factory.mktemp("leak")
    pool.run(_run, BRIEF, directory)
    return directory


@pytest.fixture(scope="module")
def rest_dir(pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank of the other layouts saw."""
    directory = tmp_path_factory.mktemp("leak_rest")
    pool.run(_run, REST, directory)
    return directory


@pytest.mark.parametrize("name", BRIEF)
def test_a_document_changes_nothing_outside_of_itself(name: str, work_dir: Path) -> None:
    _expect_no_leak(name, work_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_a_document_changes_nothing_in_the_other_layouts(name: str, rest_dir: Path) -> None:
    _expect_no_leak(name, rest_dir)


def _expect_no_leak(name: str, work_dir: Path) -> None:
    (case,) = leak_cases((name,))
    found = read_findings(case, work_dir)
    assert len(found.without_mask) == case.world_size
    assert {document: found.leaks(document) for document in DOCUMENTS} == dict.fromkeys(
        DOCUMENTS, ""
    )
    assert found.sees, "without the document mask there is a leak, and a rank did not see it"
    assert found.passed


@pytest.mark.parametrize("name", ["pp2", "tp2xcp2+sp"])
def test_what_a_rank_holds_is_looked_at(name: str, work_dir: Path) -> None:
    (case,) = leak_cases((name,))
    found = read_findings(case, work_dir).by_document["middle"]
    stages = [rank * case.recipe.parallel.pipeline // case.world_size for rank in range(len(found))]
    last = case.recipe.parallel.pipeline - 1
    assert [difference.embedding is not None for difference in found] == [s == 0 for s in stages]
    assert [difference.logits is not None for difference in found] == [s == last for s in stages]


@pytest.mark.parametrize("name", [ONE, "cp2-ring"])
def test_a_leak_over_one_border_is_found(pool, tmp_path: Path, name: str) -> None:
    pool.run(_run, (name,), tmp_path, True)
    (case,) = leak_cases((name,))
    found = read_findings(case, tmp_path)
    assert not found.passed
    assert found.leaks("first") == "logits, embedding, 15 parameters"
    assert not any(found.leaks(document) for document in DOCUMENTS if document != "first")


@pytest.mark.parametrize(("leaks", "code"), [(False, 0), (True, 1)])
def test_the_command_says_what_it_found(
    leaks: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    # What the command would set for the rest of this process.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(verify_leak, "mkdtemp", lambda prefix: str(tmp_path))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(with_overrides(RECIPE, ["model.num_layers=1"])))
    arguments = ["verify", "leak", str(recipe), "--layouts", "recompute-full,pp2"]
    with first_border_missing() if leaks else nullcontext(), pytest.raises(SystemExit) as ended:
        main([*arguments, "run.platform=cpu"])
    assert ended.value.code == code
    said = capsys.readouterr().out
    assert said.count("leak found") == 2
    assert said.count("FAILED" if leaks else "│ ok") == 2
    assert said.count("logits, embedding, 9 parameters") == 2 * leaks
    assert "pp2: not possible here: pipeline=2 x virtual_pipeline=1 does not divide" in said


def test_verdicts() -> None:
    clean, blind = Difference(True, False, False, 0), Difference(True, True, True, 0)
    everywhere = Difference(True, True, None, 3)
    case = reference_case(RECIPE)
    passed = LeakFindings(case, (everywhere,), {"first": (clean,)})
    assert passed.passed
    assert not replace(passed, without_mask=(everywhere, blind)).passed
    one_rank = Difference(None, None, None, 1)
    assert replace(passed, by_document={"first": (clean, one_rank)}).leaks("first")
    unchanged = Difference(False, False, False, 0)
    assert replace(passed, by_document={"first": (unchanged,)}).leaks("first") == "not even itself"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_batches_differ_in_one_document_that_does_not_count(document: str) -> None:
    first, second = (leak_batch(RECIPE, document, seed) for seed in (1, 2))
    columns = document_columns(RECIPE.data.sequence_length, document)
    differs = first.tokens != second.tokens
    assert differs[0, columns].any()
    differs[0, columns] = False
    assert not differs.any()
    assert not first.loss_mask[0, columns].any()
    assert np.array_equal(first.cu_seqlens, second.cu_seqlens)
    assert {columns.start, columns.stop} <= set(first.cu_seqlens)
    # A label of another document never shows the changed tokens.
    changed = first.labels != second.labels
    assert not first.loss_mask[changed].any()


def test_numbers_that_couple_documents_are_refused_with_the_reason() -> None:
    precision = RECIPE.precision.model_copy(update={"dtype": "fp8"})
    recipe = RECIPE.model_copy(update={"precision": precision})
    with pytest.raises(ConfigError, match=r"precision.dtype=fp8 .* by design; use fp32 or bf16"):
        leak_case(reference_case(RECIPE), recipe)


def test_fp8_is_refused_with_the_reason() -> None:
    precision = RECIPE.precision.model_copy(update={"fp8": "torch"})
    recipe = RECIPE.model_copy(update={"precision": precision})
    with pytest.raises(ConfigError, match=r"precision.fp8=torch .* use precision.fp8=off"):
        leak_case(reference_case(recipe), recipe)


def test_rows_too_short_for_borders_are_refused() -> None:
    short = tiny_recipe("data.sequence_length=16", "data.unit_tokens=16")
    with pytest.raises(ConfigError, match="sequence_length=16 is too short"):
        leak_case(reference_case(short), short)


def test_the_recipes_number_format_is_kept() -> None:
    bf16 = with_overrides(RECIPE, ["precision.dtype=bf16"])
    assert leak_case(reference_case(bf16), bf16).recipe.precision.dtype == "bf16"


def test_layouts_that_need_more_devices_are_named(monkeypatch) -> None:
    chosen = leak_cases((ONE, "cp2", "cp4"))
    assert within_devices(chosen, "cpu") == (chosen, {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    possible, missing = within_devices(chosen, "cuda")
    assert [case.name for case in possible] == [ONE, "cp2"]
    assert missing == {"cp4": "4 processes need as many CUDA devices, found 2"}


def _run(
    rank: int, world_size: int, names: tuple[str, ...], work_dir: Path, leaks: bool = False
) -> None:
    from phi4.engine.platform import connect, disconnect

    for case in leak_cases(names):
        meeting = rendezvous()
        if rank < case.world_size:
            platform = connect("cpu", rank=rank, world_size=case.world_size, rendezvous=meeting)
            with first_border_missing() if leaks else nullcontext():
                run_leak(case, platform, NextToken(), work_dir=work_dir)
            disconnect()


def first_border_missing():
    """A context in which attention takes the first two documents for one."""

    def faulty(cu_seqlens, *args):
        return kept(np.delete(cu_seqlens, 1), *args)

    kept = placement.visible_keys
    return mock.patch.object(placement, "visible_keys", faulty)
