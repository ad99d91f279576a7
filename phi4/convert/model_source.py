"""Locate and open a model for generation: a run's checkpoint or a Hugging Face directory.

Either is found and checked before any process starts, and opened by each rank in the recipe's
layout; every rank keeps its own shard and no rank ever holds the full model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4.config import Recipe, changed_keys, check, with_overrides
from phi4.convert.checkpoint import hf_recipe
from phi4.convert.hf import HuggingFaceModel, read_hf
from phi4.convert.hf_tokenizer import read_tokenizer
from phi4.data.vocabulary.tokenizer import Tokenizer, load_tokenizer
from phi4.engine.agreement import decided_by_writer
from phi4.engine.checkpoint import (
    load_checkpoint,
    open_checkpoint,
    recipe_of,
    verify_checkpoint,
)
from phi4.engine.engine import Engine
from phi4.engine.platform import Platform
from phi4.errors import CheckpointError, ConfigError, LayoutError, PlatformError
from phi4.rundir.checkpoints import find_checkpoint
from phi4.rundir.manifest import check_recipe, read_manifest, verify_files
from phi4.rundir.state import read_recipe


@dataclass(frozen=True)
class ModelSource:
    """A model on disk.

    Attributes:
        path: a `step_NNNNNNN` directory, or a Hugging Face directory.
        recipe: recipe with the model's layout; one replica.
        hugging_face: what the directory holds; None for a checkpoint.
    """

    path: Path
    recipe: Recipe
    hugging_face: HuggingFaceModel | None

    def tokenizer(self) -> Tokenizer:
        """Return the model's own tokenizer.

        Raises:
            TokenizerError: see `load_tokenizer` and `read_tokenizer`.
            ConfigError: it has more ids than the model.
        """
        if self.hugging_face is None:
            tokenizer = load_tokenizer(self.recipe.tokenizer)
        else:
            tokenizer = read_tokenizer(self.path)
        num_ids, vocab_size = tokenizer.vocab_size, self.recipe.model.vocab_size
        if num_ids > vocab_size:
            raise ConfigError(
                f"the tokenizer has {num_ids} ids, but model.vocab_size={vocab_size}; use the "
                f"tokenizer used in training"
            )
        return tokenizer

    def open(self, platform: Platform) -> Engine:
        """Return an engine without optimizer that holds this rank's part of the weights.

        Raises:
            CheckpointError: a file is incomplete or damaged, or has non-finite values.

        Collectives: those of building the engine; of a checkpoint, those of `open_checkpoint`.
        """
        if self.hugging_face is None:
            return open_checkpoint(self.recipe, self.path, platform)
        engine = Engine(self.recipe, platform, trains=False, draws_weights=False)
        engine.read_parameters(self.hugging_face.stream())
        return engine

    def check_successor(self, checkpoint: Path) -> None:
        """Check that `load_into` can load a checkpoint; runs in one process, from any thread.

        Reads the entire checkpoint.

        Raises:
            CheckpointError: it is incomplete, damaged, or of another model or tokenizer.
        """
        try:
            self._check_kind(checkpoint)
            manifest = read_manifest(checkpoint)
            problems = verify_files(checkpoint, manifest, sorted(manifest.files))
        except OSError as error:
            raise CheckpointError(f"cannot read {checkpoint}: {error}") from None
        if problems:
            raise CheckpointError("; ".join(problems))

    def load_into(self, engine: Engine, checkpoint: Path) -> None:
        """Replace the weights of an engine made by `open` with those of another checkpoint.

        Raises:
            CheckpointError: see `check_successor`; the weights are as before, on every rank.
            PlatformError: it could not be read completely; the weights are undefined on every rank.

        Collectives: one broadcast over all ranks; those of `verify_checkpoint` and of
            `load_checkpoint`.
        """
        try:
            decided_by_writer(engine.platform, lambda: self._check_kind(checkpoint))
            verified = verify_checkpoint(engine, checkpoint)
        except PlatformError as error:
            raise CheckpointError(str(error)) from None
        try:
            load_checkpoint(engine, checkpoint, verified, optimizer=False)
        except CheckpointError as error:
            raise PlatformError(
                f"{error}; it was removed or changed while it was read, so the model's weights are "
                f"undefined; restart the server, and keep more checkpoints of the run "
                f"(checkpoint.keep)"
            ) from None

    def _check_kind(self, checkpoint: Path) -> None:
        """Check everything except the weights; see `check_successor`."""
        try:
            written = read_recipe(checkpoint)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        check_recipe(checkpoint, read_manifest(checkpoint), written)
        # Except paths, which an override may change.
        changed = changed_keys(self.recipe, written)["identity"]
        foreign = [name for name in changed if name.startswith(("model.", "tokenizer."))]
        if foreign:
            raise CheckpointError(
                f"{', '.join(sorted(foreign))} of {checkpoint} differs from that of {self.path}; "
                f"serve it separately"
            )


def find_model(place: Path, overrides: Sequence[str] = ()) -> ModelSource:
    """Find the model in a run directory (newest checkpoint), a step or a Hugging Face directory.

    Args:
        place: a directory; one with a config.json is Hugging Face's.
        overrides: overrides of the recipe; without them the model is on one process.

    Raises:
        CheckpointError: there is no model, or it is not Phi-4's architecture.
        ConfigError: an override is wrong or would change the model.
        LayoutError: the layout breaks a rule, or has more than one replica.
    """
    _refuse_replicas(overrides)
    if (place / "config.json").is_file():
        found = read_hf(place)
        recipe = hf_recipe(found, place, place, overrides)
        check(recipe)
        return ModelSource(place, recipe, found)
    checkpoint = find_checkpoint(place)
    return ModelSource(checkpoint, recipe_of(checkpoint, overrides), None)


def _refuse_replicas(overrides: Sequence[str]) -> None:
    """Raise an error before other rules of the layout, whose messages refer to training rows."""
    layout = [override for override in overrides if override.startswith("parallel.")]
    parallel = with_overrides(Recipe(), layout).parallel
    for name in ("data", "context"):
        degree = getattr(parallel, name)
        if degree != 1:
            raise LayoutError(
                f"parallel.{name}={degree}, but generation uses one replica; expected 1: split the "
                f"model by parallel.tensor and parallel.pipeline"
            )
