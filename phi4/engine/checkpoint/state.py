"""Model, optimizer and random state through megatron dist_checkpointing.

Two optimizer formats under the distributed optimizer: `full` (fully_reshardable, any layout,
gathers 12 bytes per parameter of the model shard in host memory on every data rank) and `dp`
(dp_reshardable, no gather, same tensor and pipeline degrees). Without the distributed optimizer
every save is `full` and gathers nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from phi4.config import CheckpointConfig, identity_hash
from phi4.engine.checkpoint.directory import CheckpointDirectory, step_of, write_durably
from phi4.engine.checkpoint.manifest import (
    FileEntry,
    Manifest,
    check_metadata,
    content_names,
    hash_files,
    read_manifest,
    verify_files,
)
from phi4.engine.engine import Engine
from phi4.engine.optimizer import gather_parameters
from phi4.errors import CheckpointError, LayoutError

OptimizerFormat = Literal["full", "dp", "none"]
_SHARDING_TYPE = {"full": "fully_reshardable", "dp": "dp_reshardable"}
GATHER_BYTES_PER_PARAMETER = 12


def predicted_gather_bytes(engine: Engine, ranks_per_host: int) -> int:
    """Host memory that a `full` save takes on the machine that needs most, the same on every rank.

    Collectives: one all-reduce of a number over all ranks.
    """
    if not engine.recipe.parallel.distributed_optimizer:
        return 0
    parameters = sum(p.numel() for chunk in engine.bare_chunks for p in chunk.parameters())
    needed = torch.tensor(
        GATHER_BYTES_PER_PARAMETER * parameters * ranks_per_host, device=engine.platform.device
    )
    dist.all_reduce(needed, op=dist.ReduceOp.MAX)
    return int(needed)


def host_memory_bytes(engine: Engine) -> int:
    """Memory of the smallest machine of the run.

    Collectives: one all-reduce of a number over all ranks.
    """
    found = torch.tensor(psutil.virtual_memory().total, device=engine.platform.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def optimizer_format(
    config: CheckpointConfig,
    gather_bytes: int,
    memory_bytes: int,
    *,
    reshardable_due: bool = False,
) -> tuple[OptimizerFormat, str]:
    """The format of the next save, and why.

    Args:
        config: asks for one, or for auto.
        gather_bytes: from `predicted_gather_bytes`.
        memory_bytes: from `host_memory_bytes`; both agreed, so that all ranks choose alike.
        reshardable_due: take full this time even if it does not fit the share.
    """
    if config.optimizer_format != "auto":
        return config.optimizer_format, f"checkpoint.optimizer_format={config.optimizer_format}"
    if gather_bytes == 0:
        return "full", "nothing is gathered without the distributed optimizer"
    room = config.host_memory_share * memory_bytes
    sizes = f"gathers {gather_bytes / 2**30:.1f} GiB per host, {room / 2**30:.1f} GiB allowed"
    if gather_bytes <= room:
        return "full", sizes
    if reshardable_due:
        return "full", f"{sizes}, but a reshardable save is due"
    return "dp", sizes


def save_checkpoint(
    engine: Engine,
    root: Path,
    step: int,
    *,
    form: OptimizerFormat,
    keep: int,
    files: Mapping[str, str],
    data: Mapping[str, str],
) -> Path:
    """Write `root/step_NNNNNNN` complete or not at all.

    Args:
        engine: what is saved; form `none` saves weights only.
        root: the run's checkpoints directory, seen by all ranks.
        step: optimizer steps done.
        form: optimizer format.
        keep: complete checkpoints to keep.
        files: small text files (recipe, history, data position) by name.
        data: manifest hash of every data source.

    Collectives: barriers over all ranks; those of dist_checkpointing; one gather of file hashes.
    """
    directory = CheckpointDirectory(root, step)
    writer = engine.platform.is_writer
    if writer:
        directory.begin()
    dist.barrier()
    with engine.patches:
        gather_parameters(engine.chunks)
        dist_checkpointing.save(
            _sharded_state(engine, form, loading=False),
            str(directory.partial),
            content_metadata={"phi4": 1},
        )
    if writer:
        for name, text in files.items():
            write_durably(directory.partial / name, text.encode())
    dist.barrier()
    entries = _hash_together(directory.partial, engine)
    if writer:
        manifest = Manifest(
            step=step,
            optimizer_format=form,
            layout=_degrees(engine),
            recipe_sha256=identity_hash(engine.recipe),
            data=dict(data),
            files=entries,
        )
        directory.commit(msgspec.json.format(msgspec.json.encode(manifest), indent=1), keep)
    dist.barrier()
    return directory.final


def load_checkpoint(
    engine: Engine, checkpoint: Path, manifest: Manifest, *, optimizer: bool = True
) -> None:
    """Fill the engine from a checkpoint of any layout.

    Args:
        engine: of the same model; its layout may differ from the writer's.
        checkpoint: a `step_NNNNNNN` directory.
        manifest: from `verify_checkpoint`.
        optimizer: also load the optimizer and the random states.

    Raises:
        LayoutError: the optimizer format does not fit the layout.
        CheckpointError: the checkpoint holds no optimizer.

    Collectives: those of dist_checkpointing.
    """
    with_optimizer = optimizer and engine.optimizer is not None
    if with_optimizer:
        _check_optimizer(engine, checkpoint, manifest)
    form = manifest.optimizer_format if with_optimizer else "none"
    same_grid = manifest.layout == _degrees(engine)
    with engine.patches, torch.no_grad():
        state = dist_checkpointing.load(
            _sharded_state(engine, form, loading=True, random=same_grid and with_optimizer),
            str(checkpoint),
        )
        for index, chunk in enumerate(engine.bare_chunks):
            chunk.load_state_dict(state[_chunk_key(engine, index)], strict=True)
        if with_optimizer:
            engine.optimizer.load_state_dict(state["optimizer"])
        elif engine.optimizer is not None:
            engine.optimizer.reload_model_params()
        if "random" in state:
            _set_random_state(engine, state["random"])


def _sharded_state(
    engine: Engine, form: OptimizerFormat, *, loading: bool, random: bool = True
) -> dict[str, object]:
    metadata = {"dp_cp_group": engine.layout.groups.dp_cp}
    if form != "none" and engine.recipe.parallel.distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = _SHARDING_TYPE[form]
    state: dict[str, object] = {
        _chunk_key(engine, index): chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(engine.bare_chunks)
    }
    if form != "none":
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            dict(state), is_loading=loading, metadata=metadata
        )
        if random:
            state["random"] = _random_state(engine)
    return state


def _chunk_key(engine: Engine, index: int) -> str:
    return "model" if len(engine.bare_chunks) == 1 else f"model{index}"


def _degrees(engine: Engine) -> dict[str, int]:
    parallel = engine.recipe.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "data": engine.layout.dp_size,
        "distributed_optimizer": int(parallel.distributed_optimizer),
        "cuda": int(engine.platform.kind == "cuda"),
    }


def _random_state(engine: Engine) -> ShardedTensor:
    """Every generator of this rank as one row of a [ranks, bytes] tensor; no pickle."""
    states = [torch.get_rng_state(), *_tracked_states().values()]
    if engine.platform.kind == "cuda":
        states.append(torch.cuda.get_rng_state())
    row = torch.cat(states).unsqueeze(0)
    place = (0, engine.platform.rank, engine.platform.world_size)
    return ShardedTensor.from_rank_offsets("random", row, place)


def _set_random_state(engine: Engine, row: torch.Tensor) -> None:
    parts = row[0].cpu()
    first = torch.get_rng_state().numel()
    torch.set_rng_state(parts[:first].clone())
    offset, tracked = first, {}
    for name, state in _tracked_states().items():
        tracked[name] = parts[offset : offset + state.numel()].clone()
        offset += state.numel()
    get_cuda_rng_tracker().set_states(tracked)
    if engine.platform.kind == "cuda":
        torch.cuda.set_rng_state(parts[offset:].clone())


def _tracked_states() -> dict[str, torch.Tensor]:
    states = get_cuda_rng_tracker().get_states()
    return {name: states[name].cpu() for name in sorted(states)}


def _check_optimizer(engine: Engine, checkpoint: Path, manifest: Manifest) -> None:
    here, there = _degrees(engine), manifest.layout
    if manifest.optimizer_format == "none":
        raise CheckpointError(f"{checkpoint} holds weights only; it cannot resume a training run")
    key = "distributed_optimizer"
    if here[key] != there[key]:
        raise LayoutError(
            f"{checkpoint} was written with parallel.{key}={bool(there[key])}, asked for "
            f"{bool(here[key])}; resume with parallel.{key}={str(bool(there[key])).lower()}"
        )
    if manifest.optimizer_format == "dp":
        moved = [
            key for key in ("tensor", "pipeline", "virtual_pipeline") if here[key] != there[key]
        ]
        if moved:
            raise LayoutError(
                f"{checkpoint} has optimizer format dp, which keeps "
                f"{', '.join(f'{key}={there[key]}' for key in moved)}; resume with these, save "
                "once with checkpoint.optimizer_format=full, then change the layout"
            )


def _hash_together(directory: Path, engine: Engine) -> dict[str, FileEntry]:
    """Every rank hashes a share of the files; the writer gets all."""
    rank, size = engine.platform.rank, engine.platform.world_size
    mine = hash_files(directory, content_names(directory)[rank::size])
    shares: list[dict[str, FileEntry]] | None = [{}] * size if rank == 0 else None
    dist.gather_object(mine, shares, dst=0)
    merged = {name: entry for share in shares or () for name, entry in share.items()}
    return dict(sorted(merged.items()))


def verify_checkpoint(engine: Engine, checkpoint: Path) -> Manifest:
    """Read the manifest and check every file against it, each rank a share; all raise together.

    Raises:
        CheckpointError: incomplete, or a file is missing, truncated or altered.

    Collectives: one all-gather of the problems found, over all ranks.
    """
    rank, size = engine.platform.rank, engine.platform.world_size
    manifest, problems = None, []
    try:
        manifest = read_manifest(checkpoint)
        problems = verify_files(checkpoint, manifest, sorted(manifest.files)[rank::size])
        if not problems and rank == 0:
            check_metadata(checkpoint)
        if manifest.step != step_of(checkpoint):
            problems.append(f"{checkpoint} holds step {manifest.step}, not what its name says")
    except CheckpointError as error:
        problems = [str(error)]
    everyone: list[list[str]] = [[]] * size
    dist.all_gather_object(everyone, problems)
    found = sorted({line for lines in everyone for line in lines})
    if found:
        raise CheckpointError("; ".join(found))
    return manifest
