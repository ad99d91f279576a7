"""Check that the input files of a sweep's runs exist."""

from collections.abc import Sequence
from pathlib import Path

from phi4.data.files.manifest import manifest_path
from phi4.data.stream.sources import shard_prefixes
from phi4.errors import DataError
from phi4.launch.sweep.runs import SweepRun


def require_inputs(runs: Sequence[SweepRun]) -> None:
    """Check tokenizer, sources and held-out sources of every run, each once.

    Raises:
        DataError: names what is missing and a run that needs it.
    """
    needed: dict[tuple[str, str], str] = {}
    for run in runs:
        recipe = run.recipe
        if recipe.tokenizer.path:
            needed.setdefault(("tokenizer.path", recipe.tokenizer.path), run.name)
        for source in (*recipe.data.sources, *recipe.data.held_out):
            needed.setdefault((f"source {source.name!r}", source.path), run.name)
    for (what, path), name in needed.items():
        if what == "tokenizer.path":
            missing = [] if Path(path).is_file() else [path]
        else:
            missing = [p for p in shard_prefixes(path) if not manifest_path(p).exists()]
        if missing:
            raise DataError(
                f"run {name}: {what}: {missing[0]} does not exist; create it first (`phi4 data "
                "demo`, `phi4 data tokenize`), or run this command from the directory that the "
                "paths are relative to"
            )
