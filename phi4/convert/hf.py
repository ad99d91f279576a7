"""Read and write a Hugging Face model directory without transformers.

Weights are passed as a stream of full megatron-core tensors, so neither direction holds the model
in memory, and the caller decides where they come from (a checkpoint, live ranks). A directory is
created atomically: it is written under a temporary name and renamed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from phi4.config import ModelConfig
from phi4.convert.hf_config import hf_config, hf_generation_config, model_config
from phi4.convert.hf_shards import ShardWriter, locate, read_tensors, stored_dtype
from phi4.convert.hf_tokenizer import write_tokenizer
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import CheckpointError, ConfigError
from phi4.model.names import hf_shapes, to_hf, to_megatron
from phi4.model.shape import Dtype, format_bytes, weight_bytes

Weights = Iterable[tuple[str, torch.Tensor]]
_INV_FREQ_TOLERANCE = 1e-2
"""Relative tolerance: old checkpoints keep the buffer in bf16 too, whose values are 2^-8 apart."""


class HuggingFaceModel(NamedTuple):
    """A Phi3 directory whose names, shapes and dtypes have been checked."""

    config: ModelConfig
    stream: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    """Yields every tensor once, in model order, under its global megatron-core name, unsplit, in
    the stored dtype; raises CheckpointError for one with non-finite values."""
    dtype: Dtype
    """Smallest dtype that represents every tensor exactly."""


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
        model: shape of the weights; its RoPE base and longest sequence are written unchanged.
        tokenizer: its ids must fit the model's vocabulary.
        dtype: dtype of the stored weights.
        max_shard_bytes: a larger tensor gets a shard of its own.

    Raises:
        CheckpointError: `out` is not empty, the disk has too little space, or the weights are not
            exactly the model's.
        ConfigError: the tokenizer has more ids than the model.
        TokenizerError: the tokenizer's ranks have no exact Hugging Face form.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but "
            f"model.vocab_size={model.vocab_size}; export with the tokenizer used in training"
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


def read_hf(hf_dir: Path) -> HuggingFaceModel:
    """Open a Phi3 directory.

    Names, shapes and dtypes are checked here, from the headers; weights are read only when the
    stream is consumed. RoPE's buffer, which transformers used to store, may be present and is not a
    weight.

    Raises:
        CheckpointError: a file is missing or damaged, the tensors are not the config's, or RoPE's
            buffer has another base than the config.
        ConfigError: config.json describes what Phi-4's architecture cannot compute.
    """
    model = model_config(_read_config(hf_dir))
    shapes, buffers = hf_shapes(model), _rope_buffers(model)
    found = locate(hf_dir, shapes, buffers)
    _check_rope({name: found[name] for name in buffers if name in found}, model)
    place = {name: found[name] for name in shapes}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read_tensors(place):
            yield to_megatron(name, tensor, model)

    return HuggingFaceModel(model, stream, stored_dtype(place))


def _rope_buffers(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return shapes of RoPE's buffer under the names used by different versions of transformers."""
    owners = ["model", *(f"model.layers.{i}.self_attn" for i in range(model.num_layers))]
    return {f"{owner}.rotary_emb.inv_freq": (model.head_dim // 2,) for owner in owners}


def _check_rope(buffers: dict[str, Path], model: ModelConfig) -> None:
    exponents = torch.arange(0, model.head_dim, 2) / model.head_dim
    expected = model.rope_theta**-exponents
    for name, stored in read_tensors(buffers):
        if not torch.allclose(stored.float(), expected, rtol=_INV_FREQ_TOLERANCE, atol=1e-7):
            raise CheckpointError(
                f"{buffers[name]}: {name} does not match config.json's rope_theta="
                f"{model.rope_theta:g}; use the config.json that belongs to these weights"
            )


def _refuse_occupied(out: Path, num_bytes: int) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; give a new directory")
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
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return raw
