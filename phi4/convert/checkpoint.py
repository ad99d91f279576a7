"""Convert between checkpoints and Hugging Face directories, in one process.

A checkpoint contains its recipe, so an export needs no other input. An import makes a recipe from
config.json and the dtype of the files, and holds weights only.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from phi4.config import (
    DataConfig,
    KernelsConfig,
    ModelConfig,
    PrecisionConfig,
    Recipe,
    RunConfig,
    TokenizerConfig,
    check,
    dump_toml,
    with_overrides,
)
from phi4.convert.hf import HuggingFaceModel, read_hf, write_hf
from phi4.data.vocabulary.tokenizer import load_tokenizer
from phi4.engine.checkpoint import open_checkpoint, recipe_of, save_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.platform import Platform
from phi4.errors import CheckpointError, ConfigError
from phi4.model.shape import Dtype
from phi4.rundir.names import RECIPE_FILE, STATE_FILE
from phi4.rundir.state import RunState


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    platform: Platform,
    *,
    dtype: Dtype | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Write a checkpoint of any layout as a Hugging Face directory.

    Args:
        checkpoint: a `step_NNNNNNN` directory.
        out: must not exist, or be empty.
        platform: platform of a single process.
        dtype: dtype of the stored weights; the checkpoint's own by default.
        overrides: overrides of the checkpoint's recipe, for example the tokenizer's current path.

    Raises:
        As `recipe_of`, `open_checkpoint`, `load_tokenizer` and `write_hf`.
    """
    recipe = recipe_of(checkpoint, overrides)
    # The implementations that trained the weights do not matter here, and may not run on this
    # machine.
    recipe = recipe.model_copy(update={"kernels": KernelsConfig()})
    check(recipe, platform.world_size)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        # Entered only after write_hf has checked the output directory and the tokenizer.
        engine = open_checkpoint(recipe, checkpoint, platform)
        yield from engine.whole_parameters()
        engine.close()

    tokenizer = load_tokenizer(recipe.tokenizer)
    write_hf(out, weights(), recipe.model, tokenizer, dtype=dtype or recipe.precision.dtype)


def import_hf(
    hf_dir: Path, root: Path, platform: Platform, *, overrides: Sequence[str] = ()
) -> Path:
    """Write `root/step_0000000` with the weights of a Phi3-shape directory.

    Args:
        hf_dir: config.json and safetensors.
        root: a new or empty directory.
        platform: platform of a single process.
        overrides: overrides of the recipe made from config.json, for example data.sequence_length.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: `root` is not empty, a tensor has non-finite values, or as `read_hf`.
        ConfigError: an override is wrong or changes the model, or as `read_hf`.
        LayoutError: the recipe breaks a rule.
    """
    found = read_hf(hf_dir)
    recipe = hf_recipe(found, hf_dir, root, overrides)
    check(recipe, platform.world_size)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise CheckpointError(f"{root} exists and is not empty; give a new directory")
    engine = Engine(recipe, platform, trains=False, draws_weights=False)
    engine.read_parameters(found.stream())
    files = {RECIPE_FILE: dump_toml(recipe), STATE_FILE: RunState().to_json()}
    checkpoint = save_checkpoint(engine, root, 0, form="none", keep=1, files=files, data={})
    engine.close()
    return checkpoint


def hf_recipe(
    found: HuggingFaceModel, hf_dir: Path, run_dir: Path, overrides: Sequence[str] = ()
) -> Recipe:
    """Return the recipe of a Phi3 directory's model, with overrides; its rules are not checked.

    Args:
        found: from `read_hf`.
        hf_dir: its path, for error messages.
        run_dir: the recipe's run.dir.
        overrides: overrides of everything but the model.

    Raises:
        ConfigError: an override is wrong or changes the model.
    """
    model, phi4 = found.config, ModelConfig()
    length = min(DataConfig().sequence_length, model.max_position_embeddings)
    recipe = Recipe(
        model=model,
        # Only phi-4's own vocabulary is recognised by its size; any other must be specified.
        tokenizer=TokenizerConfig(kind="phi4" if model.vocab_size == phi4.vocab_size else "bpe"),
        data=DataConfig(sequence_length=length, unit_tokens=length),
        precision=PrecisionConfig(dtype=found.dtype),
        run=RunConfig(dir=str(run_dir)),
    )
    changed = with_overrides(recipe, overrides)
    if changed.model != model:
        raise ConfigError(
            f"overrides change [model], which is defined by {hf_dir}/config.json; remove them"
        )
    return changed
