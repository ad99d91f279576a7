"""Check that a run trains with log-probabilities of its own reference model, at start and resume.

Weights are compared by the hash of each tensor: at the first step with the weights that the run
starts from, later with what the run recorded at its first step.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.data.stream.reference_difference import weights_difference
from phi4.data.stream.references import RUN_AGAIN, ReferenceCache, open_references
from phi4.engine.agreement import decided_by_writer
from phi4.errors import CheckpointError, ConfigError
from phi4.rundir.checkpoints import find_checkpoint
from phi4.rundir.manifest import manifest_hash
from phi4.rundir.names import REFERENCE_FILE
from phi4.rundir.state import RunState
from phi4.stages.reference.sources import cache_dir_of, open_preferences
from phi4.train.hooks import Hook, RunContext


class RunReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """reference.json of a run: the reference model that it was started with."""

    dtype: str
    weights: dict[str, str]
    """Global name of each tensor -> sha256 of its bytes."""
    checkpoint: str
    """Checkpoint that the reference cache was computed from."""


class ReferenceCheck(Hook):
    """Refuses a reference cache of another reference model or of other sources."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def start(self, state: RunState) -> None:
        """Compare, and record the reference model before the first step.

        Raises:
            DataError: there is no cache, or it is of other sources; names the first difference.
            CheckpointError: it is of another model; names the number format or a tensor.

        Collectives: broadcasts of what the writer found; before the first step those of
        `Engine.weights_sha256`.
        """
        context, recipe = self._context, self._context.recipe
        cache = decided_by_writer(context.platform, self._open)
        cache.check_dtype(recipe.precision.dtype)
        if state.step:
            decided_by_writer(context.platform, partial(self._compare_with_record, cache))
        elif recipe.dpo.reference is None:
            cache.check_model(recipe.precision.dtype, context.engine.weights_sha256())
        else:
            decided_by_writer(context.platform, partial(self._compare_checkpoint, cache))
        if not state.step:
            decided_by_writer(context.platform, partial(self._record, cache))

    def _open(self) -> ReferenceCache:
        """Return the cache, after checking that it was computed for all sources."""
        recipe = self._context.recipe
        cache = open_references(cache_dir_of(recipe))
        for source in open_preferences(recipe, self._context.tokenizer):
            cache.check_source(source)
        return cache

    def _compare_checkpoint(self, cache: ReferenceCache) -> None:
        reference = self._context.recipe.dpo.reference
        assert reference is not None, "the caller has one to compare"
        checkpoint = find_checkpoint(Path(reference))
        found, expected = manifest_hash(checkpoint), cache.manifest.checkpoint_manifest_sha256
        source = f"{cache.manifest.checkpoint or 'no checkpoint'} (manifest {expected[:12]})"
        if found != expected:
            raise CheckpointError(
                f"dpo.reference is {checkpoint} (manifest {found[:12]}), the reference cache "
                f"{cache.directory} was computed from {source}; {RUN_AGAIN}"
            )

    def _compare_with_record(self, cache: ReferenceCache) -> None:
        path = self._path()
        try:
            record = msgspec.json.decode(path.read_bytes(), type=RunReference)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} does not exist, so the reference model that the run started with is "
                f"unknown; copy it from the run's original directory, or start another run"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); copy it from the run's original directory, or start "
                f"another run"
            ) from None
        difference = weights_difference(cache.manifest.weights, record.weights)
        if difference:
            raise CheckpointError(
                f"reference cache {cache.directory} is not of the reference model that the run "
                f"started with: {difference}; use the cache that it started with, or compute that "
                f"again"
            )

    def _record(self, cache: ReferenceCache) -> None:
        manifest = cache.manifest
        record = RunReference(
            dtype=manifest.dtype, weights=manifest.weights, checkpoint=manifest.checkpoint
        )
        write_atomically(self._path(), msgspec.json.encode(record))

    def _path(self) -> Path:
        return Path(self._context.recipe.run.dir) / REFERENCE_FILE


def check_reference(context: RunContext) -> Sequence[Hook]:
    """Make the hook of stages that train against a reference model; see `HookFactory`.

    Raises:
        ConfigError: the recipe names no cache.
    """
    if context.recipe.data.reference_cache is None:
        raise ConfigError(
            "data.reference_cache is not set, but this stage needs the reference model's "
            "log-probabilities; set it to a directory and fill it with `phi4 dpo cache-ref`"
        )
    return [ReferenceCheck(context)]
