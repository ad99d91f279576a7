"""Facts of attempts of runs that never were."""

from pathlib import Path
from typing import Any

import msgspec

from phi4.rundir.about import About, AboutSource, Origins, SourceTree, write_about
from phi4.rundir.launched_by import LaunchedBy

ABOUT = About(
    uid="u" * 32,
    attempt=1,
    step=0,
    unix_seconds=1_700_000_000.0,
    command=("phi4", "train", "recipe.toml"),
    directory="/work",
    user="ada",
    host="n1",
    launched_by=LaunchedBy({"job_id": "47"}),
    source_tree=SourceTree("c" * 40, is_dirty=True),
    python="3.11.7",
    packages={"torch": "2.13.0"},
    platform="cuda",
    gpu="H100",
    world_size=8,
    layout="layout: tensor 2, pipeline 2, context 1, data 2",
    degrees={"tensor": 2, "pipeline": 2, "virtual_pipeline": 1, "context": 1, "data": 2},
    kernels={"rope": "triton"},
    kernel_reasons={"rope": "auto: green row"},
    sources=(),
    held_out=(),
    stage="pretrain",
    name="a run",
    origins=Origins(),
    recipe={"run.seed": 1, "optim.learning_rate": 3e-4, "run.name": None},
)


def about(**changes: Any) -> About:
    """ABOUT with changes; `recipe` adds to its keys."""
    recipe = {**ABOUT.recipe, **changes.pop("recipe", {})}
    return msgspec.structs.replace(ABOUT, recipe=recipe, **changes)


def begun(run_dir: Path, **changes: Any) -> About:
    """Write an attempt's facts; gives them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    facts = about(**{"uid": run_dir.name, **changes})
    write_about(run_dir, facts)
    return facts


def source(name: str, sha256: str = "0123456789abcdef" * 4) -> AboutSource:
    """A source of data."""
    return AboutSource(
        name=name,
        path=f"/data/{name}",
        kind="stream",
        weight=1.5,
        sha256=sha256,
        num_tokens=1000,
        num_documents=10,
        num_shards=1,
    )
