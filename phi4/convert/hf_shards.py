"""Read and write safetensors shards one tensor at a time.

All sizes are known before the first tensor arrives, so every shard gets its header and its full
length at once and a tensor is written at its own offset: tensors may come in any order, and only
one of them is in memory. (`safetensors.torch.save_file` needs all tensors of a shard at once.)
"""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from phi4.errors import CheckpointError
from phi4.model.shape import DTYPE_BYTES, Dtype

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_SAFETENSORS_DTYPE: dict[Dtype, str] = {"fp32": "F32", "bf16": "BF16"}
_TORCH_DTYPE: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_READABLE = ("F32", "BF16", "F16")
_COUNTED_VALUES = 1 << 24
"""Elements checked at a time for non-finite values, because the check allocates as much memory
again."""


class ShardWriter:
    """Writes one model as shards plus index into an existing directory.

    Args:
        directory: existing and without shards.
        shapes: every tensor of the model, in the order in which shards are filled.
        dtype: stored; tensors are cast to it.
        max_shard_bytes: of the tensors in a shard; a larger tensor gets a shard of its own.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: Dtype,
        max_shard_bytes: int,
    ) -> None:
        self._dtype = dtype
        self._waiting = dict(shapes)
        self._place: dict[str, tuple[Path, int]] = {}
        shards = _filled(shapes, DTYPE_BYTES[dtype], max_shard_bytes)
        files = [
            directory / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        for file, names in zip(files, shards, strict=True):
            self._lay_out(file, {name: shapes[name] for name in names})
        self._files = files
        self._write_index(directory / INDEX_NAME, shapes)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor.

        Raises:
            CheckpointError: the tensor has the wrong shape, was already written, is not part of the
                model, or has non-finite values in the stored dtype.
        """
        shape = self._waiting.pop(name, None)
        if shape is None:
            reason = "came twice" if name in self._place else "is not part of the model"
            raise CheckpointError(f"tensor {name} {reason}; give each tensor of the model once")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}; "
                f"give full tensors of the recipe's model"
            )
        file, offset = self._place[name]
        stored = tensor.detach().to("cpu", _TORCH_DTYPE[self._dtype]).contiguous()
        wrong = _num_non_finite(stored)
        if wrong:
            raise CheckpointError(
                f"tensor {name} has non-finite values in {self._dtype}: {wrong:,} of "
                f"{stored.numel():,}; export an earlier checkpoint"
            )
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(stored.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Make the shards durable.

        Raises:
            CheckpointError: a tensor was not written.
        """
        if self._waiting:
            raise CheckpointError(
                f"{len(self._waiting)} tensors are missing, the first is "
                f"{next(iter(self._waiting))}; give each tensor of the model once"
            )
        for file in self._files:
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())

    def _lay_out(self, file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + prod(shape) * DTYPE_BYTES[self._dtype]
            header[name] = {
                "dtype": _SAFETENSORS_DTYPE[self._dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        start = 8 + len(text)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(start + end)
        for name in shapes:
            self._place[name] = (file, start + header[name]["data_offsets"][0])

    def _write_index(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        total = sum(prod(shape) for shape in shapes.values())
        index = {
            "metadata": {
                "total_parameters": total,
                "total_size": total * DTYPE_BYTES[self._dtype],
            },
            "weight_map": {name: file.name for name, (file, _) in sorted(self._place.items())},
        }
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def locate(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Path]:
    """Return the shard of every tensor, after checking names, shapes and dtypes in the headers.

    Args:
        directory: holds the shards.
        shapes: shapes of the tensors that must be there.
        optional: shapes of tensors that may be missing.

    Raises:
        CheckpointError: no safetensors, an unreadable shard, a tensor missing, unexpected, stored
            twice, of another shape or quantised.
    """
    place: dict[str, Path] = {}
    known = {**(optional or {}), **shapes}
    for file in _shard_files(directory):
        for name, shape, dtype in _header(file):
            if name in place:
                raise CheckpointError(
                    f"{name} is in both {place[name].name} and {file.name}; expected in one shard"
                )
            if known.get(name, shape) != shape:
                raise CheckpointError(
                    f"{file}: {name} has shape {list(shape)}, config.json says "
                    f"{list(known[name])}; use the config.json that belongs to these weights"
                )
            if dtype not in _READABLE:
                raise CheckpointError(
                    f"{file}: {name} is stored as {dtype}, expected one of {', '.join(_READABLE)}; "
                    f"use the weights before quantisation"
                )
            place[name] = file
    for reason, names in (
        ("are missing", shapes.keys() - place.keys()),
        ("are not part of Phi-4", place.keys() - known.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{directory}: {len(names)} tensors {reason}, the first is {min(names)}; "
                f"expected the {len(shapes)} tensors of a Phi3ForCausalLM without biases"
            )
    return place


def stored_dtype(place: Mapping[str, Path]) -> Dtype:
    """Return bf16 if all of these tensors are bf16, else fp32, which represents the others
    exactly."""
    stored = {
        dtype for file in set(place.values()) for name, _, dtype in _header(file) if name in place
    }
    return "bf16" if stored == {_SAFETENSORS_DTYPE["bf16"]} else "fp32"


def read_tensors(place: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in the order of `place`, one in memory at a time (the files are mapped).

    Raises:
        CheckpointError: a shard became unreadable, or a tensor has non-finite values.
    """
    opened: Path | None = None
    shard: Any = None
    for name, file in place.items():
        try:
            if file != opened:
                shard, opened = safe_open(file, framework="pt"), file
            tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from None
        wrong = _num_non_finite(tensor)
        if wrong:
            raise CheckpointError(
                f"{file}: {name} has non-finite values: {wrong:,} of {tensor.numel():,}; "
                f"copy the file again or use other weights"
            )
        yield name, tensor


def _num_non_finite(tensor: torch.Tensor) -> int:
    pieces = tensor.flatten().split(_COUNTED_VALUES)
    return sum(piece.numel() - int(piece.isfinite().sum()) for piece in pieces)


def _filled(
    shapes: Mapping[str, tuple[int, ...]], value_bytes: int, max_shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = prod(shape) * value_bytes
        if size > room or not shards:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _shard_files(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index} is not a safetensors index; copy it again") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its directory; copy it again")
        return [directory / name for name in sorted(names)]
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    raise CheckpointError(
        f"{directory} has neither {INDEX_NAME} nor {SINGLE_NAME}; only safetensors are read, "
        f"convert other formats with transformers' save_pretrained first"
    )


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                part = shard.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{file} is missing, but the index names it; copy it again")
    return CheckpointError(f"{file} is damaged or incomplete ({error}); copy it again")
