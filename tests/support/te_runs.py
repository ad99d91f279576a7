"""Ranks in fresh interpreters whose Transformer Engine is the stand-in.

megatron-core decides at its import whether there is Transformer Engine, so neither the tests' own
process nor the ranks that are forked from one can be used.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi4.config import Recipe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests/support/te_stand_in/package"
VERSIONS = ("2.9.0", "2.10.0", "2.11.0")
SIZES = (
    *("precision.fp8=te", "precision.dtype=bf16", "model.num_layers=4", "model.hidden_size=128"),
    *("model.intermediate_size=128", "batch.micro_batch_size=8", "batch.global_batch_size=16"),
)
"""A recipe of `tiny_recipe` whose FP8 is Transformer Engine's."""


def search_path(directory: Path, version: str) -> str:
    """PYTHONPATH on which a version of the stand-in is installed.

    Args:
        directory: where its metadata is written.
        version: as Transformer Engine calls it.
    """
    metadata = directory / f"transformer_engine-{version}.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n"
    )
    return os.pathsep.join([str(directory), str(PACKAGE), str(ROOT), str(ROOT / "kernels")])


def run_with_te(
    function: Callable[..., Any], *args: Any, num_ranks: int = 1, version: str = VERSIONS[-1]
) -> list[Any]:
    """Call `function(rank, *args)` in ranks, each a fresh interpreter; what they return.

    Raises:
        AssertionError: a rank failed; with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="phi4_te_") as name:
        directory = Path(name)
        (directory / "meeting").mkdir()
        where = {"PYTHONPATH": search_path(directory, version), "GLOO_SOCKET_IFNAME": "lo"}
        call = directory / "call"
        call.write_bytes(pickle.dumps((function.__module__, function.__name__, args, num_ranks)))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.te_rank", str(directory), str(rank)],
                env=os.environ | where,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        try:
            printed = [rank.communicate()[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(printed)
        return [pickle.loads((directory / f"{rank}").read_bytes()) for rank in range(num_ranks)]


def sizes(scaling: str, *overrides: str) -> tuple[str, ...]:
    """Overrides of a recipe; delayed scaling takes all layers."""
    ends = 0 if scaling == "delayed" else 1
    recipe = (f"precision.fp8_recipe={scaling}", f"precision.fp8_end_layers_in_bf16={ends}")
    return (*SIZES, *recipe, *overrides)


@contextmanager
def engine_in(rank: int, recipe: Recipe, meeting: Path, kind: str = "cpu") -> Iterator[Any]:
    """The recipe's engine on this machine; inside such a rank, or on a GPU."""
    from phi4.engine.engine import Engine
    from phi4.engine.platform import connect, disconnect

    world_size = recipe.parallel.model_parallel_size * recipe.parallel.data
    meeting.mkdir(exist_ok=True)
    platform = connect(kind, rank=rank, world_size=world_size, rendezvous=str(meeting))
    engine = Engine(recipe, platform)
    yield engine
    engine.close()
    disconnect()


def steps(engine: Any, first: int, end: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of training steps of the parity data."""
    from phi4.stages.pretrain import NextToken
    from tests.support.engines import batches_of

    results = [
        engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-3)
        for step in range(first, end)
    ]
    return [(result.loss, result.grad_norm) for result in results]


def states_of(engine: Any) -> dict[str, Any]:
    """Copies of the scales and histories of delayed scaling."""
    from phi4.engine.model.fp8.te_state import delayed_states

    return {name: state.clone() for name, state in delayed_states(engine.bare_chunks).items()}


def save(engine: Any, root: Path, step: int) -> None:
    """A whole checkpoint."""
    from phi4.engine.checkpoint.saving import save_checkpoint

    save_checkpoint(engine, root, step, form="full", keep=1, files={}, data={})


def load(engine: Any, root: Path) -> None:
    """The only checkpoint there is."""
    from phi4.engine.checkpoint.loading import load_checkpoint, verify_checkpoint

    [checkpoint] = root.glob("step_*")
    load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
