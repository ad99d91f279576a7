"""A checkpoint's content: model, optimizer and random state as megatron's sharded state.

Two optimizer formats under the distributed optimizer: `full` (fully_reshardable, any layout,
gathers 12 bytes per parameter of the model shard in host memory on every data rank) and `dp`
(dp_reshardable, no gather, same tensor and pipeline degrees). Without the distributed optimizer
every save is `full` and gathers nothing.
"""

import psutil
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from phi4.config import CheckpointConfig
from phi4.engine.engine import Engine
from phi4.engine.model.fp8.te_state import delayed_states
from phi4.rundir.manifest import OptimizerFormat

_SHARDING_TYPE = {"full": "fully_reshardable", "dp": "dp_reshardable"}
GATHER_BYTES_PER_PARAMETER = 12


def predicted_gather_bytes(engine: Engine, ranks_per_host: int) -> int:
    """Estimate host memory of a `full` save on the machine that needs most; the same on every rank.

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
    """Return the memory of the smallest machine of the run.

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
    """Choose the format of the next save; return it with the reason.

    Args:
        config: gives the format, or auto.
        gather_bytes: from `predicted_gather_bytes`.
        memory_bytes: from `host_memory_bytes`; both are equal on all ranks, so that all choose
            alike.
        reshardable_due: use full this time even if it exceeds the limit.
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


def sharded_state(
    engine: Engine, form: OptimizerFormat, *, loading: bool, random: bool = True
) -> dict[str, object]:
    """Return the engine's state in megatron-core's form, without empty records.

    Args:
        engine: a load writes to the tensors of this state in place.
        form: `none` omits the optimizer and the random state.
        loading: passed to megatron-core's optimizer.
        random: whether to include the random state.

    Collectives: saving `full` under the distributed optimizer gathers 12 bytes per parameter over
    the data ranks.
    """
    metadata = {"dp_cp_group": engine.layout.groups.dp_cp}
    if form != "none" and engine.recipe.parallel.distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = _SHARDING_TYPE[form]
    state: dict[str, object] = {
        chunk_key(engine, index): without_empty_records(chunk.sharded_state_dict(metadata=metadata))
        for index, chunk in enumerate(engine.bare_chunks)
    }
    if form != "none":
        assert engine.optimizer is not None, "an engine that trains has one"
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            dict(state), is_loading=loading, metadata=metadata
        )
        if scalings := _delayed_scaling(engine):
            state["fp8"] = scalings
        if random:
            state["random"] = _random_state(engine)
    return state


def without_empty_records(state: dict[str, object]) -> dict[str, object]:
    """Omit the extra state of layers that have none; each would be a pickle of None."""
    return {
        key: value
        for key, value in state.items()
        if not (isinstance(value, ShardedObject) and value.data is None)
    }


def chunk_key(engine: Engine, index: int) -> str:
    """Return the name of a model chunk in the state."""
    return "model" if len(engine.bare_chunks) == 1 else f"model{index}"


def degrees(engine: Engine) -> dict[str, int]:
    """Return the degrees of the layout that a manifest records."""
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


def _delayed_scaling(engine: Engine) -> dict[str, ShardedTensor]:
    """Return scales and histories of Transformer Engine's linears, by name and direction.

    All ranks of a layer agreed on the largest of their values when they were computed, so that one
    of them saves for all, and every layout loads the same.
    """
    layout = engine.layout
    replica = (0, layout.tp_rank, layout.dp_rank * layout.cp_size + layout.cp_rank)
    return {
        key: ShardedTensor.from_rank_offsets(f"fp8.{key}", tensor, replica_id=replica)
        for key, tensor in delayed_states(engine.bare_chunks).items()
    }


def _random_state(engine: Engine) -> ShardedTensor:
    """Return every generator of this rank as one row of a [ranks, bytes] tensor; no pickle."""
    states = [torch.get_rng_state(), *_tracked_states().values()]
    if engine.platform.kind == "cuda":
        states.append(torch.cuda.get_rng_state())
    row = torch.cat(states).unsqueeze(0)
    place = (0, engine.platform.rank, engine.platform.world_size)
    return ShardedTensor.from_rank_offsets("random", row, place)


def set_random_state(engine: Engine, row: torch.Tensor) -> None:
    """Set every generator of this rank from its row, [1, bytes]."""
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
