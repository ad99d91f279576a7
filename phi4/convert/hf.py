"""A Hugging Face model directory, written and read without transformers.

Weights pass through as a stream of full megatron-core tensors, so neither direction holds the model
in memory, and where they come from (a checkpoint, live ranks) is the caller's affair. A directory
appears complete or not at all: it is written beside its place and renamed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from phi4.config import ModelConfig
from phi4.convert.hf_config import hf_config, hf_generation_config, model_config
from phi4.convert.hf_shards import ShardWriter, locate, read_tensors
from phi4.convert.hf_tokenizer import write_tokenizer
from phi4.data.tokenizer import Tokenizer
from phi4.errors import CheckpointError, ConfigError
from phi4.model.names import hf_shapes, to_hf, to_megatron
from phi4.model.shape import Dtype, format_bytes, weight_bytes

Weights = Iterable[tuple[str, torch.Tensor]]


def write_hf(
    out: Path,
    weights: Weights,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    dtype: Dtype = "bf16",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that transformers 4.57 and 5 open with their Auto classes.

    Args:
        out: must not exist, or be an empty directory.
        weights: every tensor once, in any order: global megatron-core name and full tensor.
        model: shape of the weights; its RoPE base and longest sequence are written as they are.
        tokenizer: its ids must fit the model's vocabulary.
        dtype: of the stored weights.
        max_shard_bytes: a larger tensor gets a shard of its own.

    Raises:
        CheckpointError: `out` holds something, the disk is too small, or the weights are not
            exactly the model's.
        ConfigError: the tokenizer has more ids than the model.
        TokenizerError: the tokenizer's ranks have no exact Hugging Face form.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size={model.vocab_size}; "
            f"export with the tokenizer of the training"
        )
    out = out.resolve()
    _refuse_occupied(out, weight_bytes(model, dtype))
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        _write_configs(partial, model, tokenizer, dtype)
        write_tokenizer(partial, tokenizer, model.max_position_embeddings)
        shards = ShardWriter(
            partial, hf_shapes(model), dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        for name, tensor in weights:
            shards.write(*to_hf(name, tensor, model))
        shards.finish()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_hf(hf_dir: Path) -> tuple[ModelConfig, Callable[[], Iterator[tuple[str, torch.Tensor]]]]:
    """The shape of a Phi3-shape directory, and a function that streams its weights.

    Names, shapes and dtypes are checked here, from the headers; no weight is read before the
    stream is. The stream yields every tensor once, in model order, under its global megatron-core
    name, full, in the stored dtype.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not the config's.
        ConfigError: config.json describes what Phi-4's architecture cannot compute.
    """
    model = model_config(_read_config(hf_dir))
    shapes = hf_shapes(model)
    found = locate(hf_dir, shapes)
    place = {name: found[name] for name in shapes}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read_tensors(place):
            yield to_megatron(name, tensor, model)

    return model, stream


def _refuse_occupied(out: Path, num_bytes: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; name a new directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"the weights need {format_bytes(num_bytes)}, {out.parent} has {format_bytes(free)} "
            f"free; write to another disk"
        )


def _write_configs(directory: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: Dtype) -> None:
    ids = {
        "bos_id": tokenizer.eod_id,
        "eos_id": tokenizer.im_end_id,
        "pad_id": tokenizer.pad_id,
    }
    for name, content in (
        ("config.json", hf_config(model, dtype=dtype, **ids)),
        ("generation_config.json", hf_generation_config(**ids)),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_config(hf_dir: Path) -> dict[str, Any]:
    path = hf_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(
            f"{path} cannot be read; give the directory that holds config.json and the shards"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no table; copy it again")
    return raw
