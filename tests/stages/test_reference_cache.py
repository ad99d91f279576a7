"""`phi4 dpo cache-ref`: any layout, stopped anywhere, and served only to whom it belongs."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from phi4.cli import main
from phi4.config import dump_toml
from phi4.data.stream.reference_files import FINISHED
from phi4.data.stream.references import open_references
from phi4.errors import DataError
from phi4.rundir.names import REFERENCE_FILE
from phi4.stages.reference import job
from phi4.stages.reference.chunks import Chunk, write_chunk
from tests.data.preferences import drawn_pairs
from tests.support import preference_runs
from tests.support.engines import engine_on
from tests.support.preference_runs import NUM_PAIRS, recipe_of
from tests.support.ranks import RankPool, pool_fixture
from tests.support.waiting import LONG_SECONDS, wait_until

NAMES = ("pairs", "pivots", "others")
TP2, PP2, CP2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"
LAYOUTS = {
    "tp2": (TP2,),
    "dp2": ("parallel.data=2",),
    "pp2xcp2": (PP2, CP2),
    "tp2xcp2+sp": (TP2, CP2, "parallel.sequence=true"),
    "pp2-vpp2": (
        *(PP2, "parallel.virtual_pipeline=2", "parallel.overlap_p2p=true"),
        *("model.num_layers=4", "run.init_from=deep", "data.reference_cache=deep_cache"),
    ),
}


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Path:
    directory = tmp_path_factory.mktemp("made")
    preference_runs.write_files(directory)
    pool.run(preference_runs.start, directory)
    pool.run(preference_runs.start, directory, "other", 2)
    assert pool.run(preference_runs.cache, directory) == [""]
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def arrays(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.npy"))}


def stopped_after_two(rank: int, world_size: int, root: Path) -> str:
    """A job that cannot write its third chunk."""
    written = []

    def write(chunk: Chunk, sums: np.ndarray) -> None:
        if len(written) == 2:
            raise DataError("stopped")
        written.append(chunk)
        write_chunk(chunk, sums)

    with mock.patch.object(job, "write_chunk", write):
        return preference_runs.cache(rank, world_size, root)


def counted(rank: int, world_size: int, root: Path) -> tuple[str, int]:
    """A job, and the chunks that it computes."""
    with mock.patch.object(job, "write_chunk", side_effect=write_chunk) as write:
        return preference_runs.cache(rank, world_size, root), write.call_count


def test_job_that_stopped_goes_on_to_the_same_bits(copy: Path, pool: RankPool) -> None:
    whole = arrays(copy / "cache")
    assert set(whole) == {f"{name}.{what}.npy" for name in NAMES for what in ("items", "log_probs")}
    shutil.rmtree(copy / "cache")
    assert pool.run(stopped_after_two, copy) == ["DataError: stopped"]
    with pytest.raises(DataError, match="unfinished"):
        open_references(copy / "cache")
    [(error, computed)] = pool.run(counted, copy)
    assert (error, arrays(copy / "cache")) == ("", whole)
    [(error, again)] = pool.run(counted, copy)
    assert (error, again) == ("", 0) and computed > 3
    assert {path.suffix for path in (copy / "cache").iterdir()} == {".npy", ".json"}


def test_cache_of_another_model_names_a_tensor(copy: Path, pool: RankPool) -> None:
    other = ("run.init_from=other",)
    before = arrays(copy / "cache")
    [error] = pool.run(preference_runs.cache, copy, other)
    assert "another model: tensor decoder.layers.0.mlp.linear_fc1.weight" in error
    assert "use --overwrite" in error and len(error.splitlines()) == 1
    assert arrays(copy / "cache") == before
    [error] = pool.run(preference_runs.run, copy, other)
    assert error.startswith("CheckpointError: reference cache cache is of another model: tensor ")
    assert pool.run(preference_runs.cache, copy, other, True) == [""]
    assert arrays(copy / "cache") != before
    assert pool.run(preference_runs.run, copy, (*other, "run.steps=1")) == [""]


def test_run_with_changed_pairs_names_the_document(copy: Path, pool: RankPool) -> None:
    pairs = drawn_pairs(NUM_PAIRS)
    pairs[4][0].ids[-1] += 1
    preference_runs.write_pairs(copy, "pairs", pairs)
    [error] = pool.run(preference_runs.run, copy)
    assert "pairs.bin, document 4) is not what the reference cache was computed for" in error
    preference_runs.write_pairs(copy, "pairs", drawn_pairs(NUM_PAIRS)[:-1])
    [error] = pool.run(preference_runs.run, copy)
    assert error.startswith("DataError: source 'pairs'") and "cache" in error
    preference_runs.write_pairs(
        copy, "pairs", drawn_pairs(NUM_PAIRS), chat_template_sha256="0" * 64
    )
    [error] = pool.run(preference_runs.run, copy)
    assert "was written with chat template 000000000000" in error


def test_run_goes_on_with_the_reference_that_it_began_with(copy: Path, pool: RankPool) -> None:
    assert pool.run(preference_runs.run, copy) == [""]
    record = copy / "runs/default" / REFERENCE_FILE
    assert record.exists()
    latest = copy / "runs/default/checkpoints/latest"
    latest.write_text("step_0000001")
    shutil.rmtree(copy / "runs/default/checkpoints/step_0000002")
    other = "data.reference_cache=cache_of_other"
    assert pool.run(preference_runs.cache, copy, (other, "run.init_from=other")) == [""]
    [error] = pool.run(preference_runs.run, copy, (other,))
    assert "is not of the reference model that the run started with: tensor" in error
    record.rename(copy / "kept")
    [error] = pool.run(preference_runs.run, copy)
    assert f"{REFERENCE_FILE} does not exist" in error
    (copy / "kept").rename(record)
    assert pool.run(preference_runs.run, copy) == [""]


def test_other_checkpoint_as_reference_is_compared(copy: Path, pool: RankPool) -> None:
    reference = ("dpo.reference=other", "data.reference_cache=cache_of_other", "run.steps=1")
    assert pool.run(preference_runs.cache, copy, reference) == [""]
    assert pool.run(preference_runs.run, copy, reference) == [""]
    other = ("dpo.reference=start", *reference[1:], "run.dir=again")
    [error] = pool.run(preference_runs.run, copy, other)
    assert "dpo.reference is start/checkpoints/step_0000000" in error
    assert "was computed from other/checkpoints/step_0000000" in error
    [error] = pool.run(preference_runs.run, copy, (*reference, "precision.dtype=bf16", "run.dir=b"))
    assert "precision.dtype=fp32, but the recipe has bf16" in error


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_of_any_layout_serves_any_other(
    layout: str, copy: Path, four_ranks: RankPool
) -> None:
    overrides = LAYOUTS[layout]
    deep = tuple(override for override in overrides if "model." in override or "deep" in override)
    if deep:
        four_ranks.run(preference_runs.start, copy, "deep", 1, deep[:1])
        assert four_ranks.run(preference_runs.cache, copy, deep)[0] == ""
    truth = open_references(copy / ("deep_cache" if deep else "cache"))
    assert set(four_ranks.run(preference_runs.cache, copy, overrides)) == {""}
    elsewhere = (*overrides, "data.reference_cache=elsewhere")
    assert set(four_ranks.run(preference_runs.cache, copy, elsewhere)) == {""}
    found = open_references(copy / "elsewhere")
    for name in NAMES:
        np.testing.assert_allclose(
            found.log_probs(name), truth.log_probs(name), rtol=1e-6, atol=5e-5
        )
    assert found.manifest.weights == truth.manifest.weights
    assert set(four_ranks.run(preference_runs.run, copy, overrides)) == {""}


def hashes(rank: int, world_size: int, overrides: tuple[str, ...]) -> dict[str, str] | None:
    with engine_on(rank, recipe_of(*overrides), trains=False) as engine:
        return engine and engine.weights_sha256()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hashes_of_weights_do_not_depend_on_the_layout(dtype: str, four_ranks: RankPool) -> None:
    precision = f"precision.dtype={dtype}"
    truth, *_ = four_ranks.run(hashes, (precision,))
    for layout in (TP2, PP2), (PP2, CP2):
        for found in four_ranks.run(hashes, (precision, *layout)):
            assert found == truth and len(truth) > 10


@pytest.mark.slow
def test_job_that_is_killed_goes_on_to_the_same_bits(copy: Path) -> None:
    preference_runs.write_pairs(copy, "pairs", drawn_pairs(200))
    (copy / "recipe.toml").write_text(dump_toml(recipe_of()))
    argv = [sys.executable, "-m", "phi4", "dpo", "cache-ref", "recipe.toml", "--chunk-rows=1"]

    def job_into(cache: str) -> subprocess.Popen:
        command = [*argv, f"data.reference_cache={cache}"]
        return subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL)

    killed = job_into("killed")
    chunks = copy / "killed" / "chunks"
    wait_until(lambda: len(list(chunks.rglob("*.npy"))) > 5, "the first chunks")
    killed.send_signal(signal.SIGKILL)
    killed.wait(LONG_SECONDS)
    assert not (copy / "killed" / FINISHED).exists()
    for cache in ("killed", "straight"):
        assert job_into(cache).wait(LONG_SECONDS) == 0
    assert arrays(copy / "killed") == arrays(copy / "straight")


def test_gate_of_a_stage_that_has_none_cannot_be_skipped(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(dump_toml(recipe_of("run.stage=pretrain")))
    with pytest.raises(SystemExit) as stop:
        main(["train", str(tmp_path / "recipe.toml"), "--no-gate"])
    assert stop.value.code == 2
    assert "run.stage=pretrain has none" in capsys.readouterr().err


def test_cache_needs_a_place(capsys: pytest.CaptureFixture) -> None:
    recipe = Path(__file__).parents[2] / "examples/recipes/tiny_pretrain.toml"
    with pytest.raises(SystemExit) as stop:
        main(["dpo", "cache-ref", str(recipe)])
    assert stop.value.code == 2
    assert "data.reference_cache is not set" in capsys.readouterr().err
