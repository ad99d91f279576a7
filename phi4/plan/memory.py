"""Memory per GPU of each pipeline stage, and host memory during a save."""

from collections.abc import Sequence
from dataclasses import dataclass

from phi4.config import Recipe, check, with_overrides
from phi4.engine.checkpoint.state import GATHER_BYTES_PER_PARAMETER
from phi4.engine.fake_ranks import ChunkShape, RankShape, rank_shapes
from phi4.engine.model.fp8.device import gpu_fault
from phi4.errors import LayoutError, PlatformError
from phi4.model.cards import Card
from phi4.model.shape import DTYPE_BYTES, training_bytes_per_parameter
from phi4.plan.activations import Activations
from phi4.plan.schedule import peak_in_flight

GRADIENT_BYTES = 4
"""megatron-core's gradient buffer is fp32 (grad_reduce_in_fp32) for bf16 and fp32 parameters."""
FP8_CASTS_BYTES = 2
"""A weight is cast for the forward product and, transposed, for the gradient of the input. With
Transformer Engine too, according to its sources (`_data` and `_transpose` of its FP8 tensors)."""
CONTEXT_BYTES = 2**30
"""Allowance, not a measurement: CUDA context, cuBLAS workspaces, kernel code."""
NCCL_GROUP_BYTES = 2**28
"""Allowance, not a measurement: buffers of one communicator."""
FRAGMENTATION = 0.05
"""Allowance, not a measurement: fraction of activations and working memory lost to
fragmentation."""


@dataclass(frozen=True)
class WeightGather:
    """The gather of updated weights over data and context ranks, on one GPU."""

    received_bytes: int
    """Per step, without what messages are padded by."""
    plain_bytes: int
    """Per step, with every weight in its dtype."""
    message_bytes: int
    """Memory of FP8 messages, of the largest model chunk; an upper bound."""


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes on one GPU of a pipeline rank, during the backward pass."""

    pp_rank: int
    layers: tuple[int, ...]
    """Parameters per model chunk."""
    in_flight: tuple[int, ...]
    """Micro-batches per model chunk at the peak."""
    num_parameters: int
    weights: int
    """Bytes of weights, including FP8 casts that are kept during a step."""
    gradients: int
    optimizer: int
    activations: int
    """Kept by the layers for the micro-batches in flight."""
    loss_head: int
    """Kept by final norm, output layer and loss for the micro-batches in flight."""
    working: int
    """Temporary memory while one layer or the loss head runs; an upper bound."""
    batch: int
    """Tokens and RoPE tables of the micro-batches in flight and of the one being copied to the
    device."""
    allowance: int
    gather: "WeightGather"
    """Of parallel.fp8_param_gather; nothing of a micro-batch is kept then."""

    @property
    def total(self) -> int:
        """Sum of all of them, with the larger of the micro-batches' and the gather's."""
        state = self.weights + self.gradients + self.optimizer
        passes = self.activations + self.loss_head + self.working + self.batch
        return state + max(passes, self.gather.message_bytes) + self.allowance


@dataclass(frozen=True)
class MemoryPlan:
    """Memory plan of a recipe on a number of GPUs of one kind."""

    recipe: Recipe
    """The recipe, with parallel.data derived from the number of GPUs."""
    card: Card
    num_gpus: int
    gpus_per_node: int
    num_parameters: int
    """Parameters of the full model, each counted once."""
    stages: tuple[StageMemory, ...]

    @property
    def largest_stage_parameters(self) -> int:
        """Parameters on a GPU of the largest stage."""
        return max(stage.num_parameters for stage in self.stages)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step and data-parallel rank."""
        batch = self.recipe.batch
        return batch.global_batch_size // (batch.micro_batch_size * self.recipe.parallel.data)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.recipe.batch.global_batch_size * self.recipe.data.sequence_length

    @property
    def gather_bytes(self) -> int:
        """Host memory that a save in format `full` takes on the most loaded machine."""
        if not self.recipe.parallel.distributed_optimizer:
            return 0
        ranks = min(self.num_gpus, self.gpus_per_node)
        return GATHER_BYTES_PER_PARAMETER * self.largest_stage_parameters * ranks

    def save_format(self, host_bytes: int) -> str:
        """Return the format that checkpoint.optimizer_format=auto uses for routine saves on such a
        machine."""
        share = self.recipe.checkpoint.host_memory_share
        return "full" if self.gather_bytes <= share * host_bytes else "dp"


def make_plan(recipe: Recipe, num_gpus: int, card: Card, gpus_per_node: int = 8) -> MemoryPlan:
    """Lay out a recipe on GPUs and compute its memory plan.

    Args:
        recipe: its parallel.data is derived from the number of GPUs.
        num_gpus: total number of GPUs.
        card: the kind of GPU.
        gpus_per_node: GPUs, and so ranks, that share a machine's memory.

    Raises:
        LayoutError: num_gpus is not a multiple of the GPUs of one model copy, or a rule is
            violated.
        PlatformError: the recipe uses FP8 and the card does not support it.
    """
    fault = gpu_fault(recipe.precision, card.compute_capability)
    if fault:
        raise PlatformError(f"{card.title}: {fault}")
    recipe = _laid_out(recipe, num_gpus)
    shapes = rank_shapes(recipe)
    stages = [
        _stage(recipe, [shape for shape in shapes if shape.pp_rank == pp_rank])
        for pp_rank in range(recipe.parallel.pipeline)
    ]
    num_parameters = sum(shape.num_counted_parameters for shape in shapes)
    return MemoryPlan(recipe, card, num_gpus, gpus_per_node, num_parameters, tuple(stages))


def optimizer_bytes_per_parameter(recipe: Recipe, *, distributed: bool) -> float:
    """Return the bytes per parameter of AdamW's moments and, with bf16 weights, of the fp32 master
    copy.

    Args:
        recipe: gives the dtype and the data and context ranks.
        distributed: split over these ranks (ZeRO-1).
    """
    dtype, parallel = recipe.precision.dtype, recipe.parallel
    whole = training_bytes_per_parameter(dtype) - DTYPE_BYTES[dtype] - GRADIENT_BYTES
    return whole / (parallel.data * parallel.context if distributed else 1)


def _laid_out(recipe: Recipe, num_gpus: int) -> Recipe:
    parallel = recipe.parallel
    copies, rest = divmod(num_gpus, parallel.model_parallel_size)
    if rest or not copies:
        raise LayoutError(
            f"--gpus {num_gpus} is not a multiple of tensor={parallel.tensor} x pipeline="
            f"{parallel.pipeline} x context={parallel.context} = {parallel.model_parallel_size}; "
            "change --gpus or one of these degrees"
        )
    recipe = with_overrides(recipe, [f"parallel.data={copies}"])
    check(recipe, num_gpus)
    return recipe


def _stage(recipe: Recipe, tensor_ranks: Sequence[RankShape]) -> StageMemory:
    fullest = max(tensor_ranks, key=lambda shape: shape.num_parameters)
    kept, parallel, batch = Activations(recipe), recipe.parallel, recipe.batch
    chunks, num_parameters = fullest.chunks, fullest.num_parameters
    layers = [
        (chunk.num_layers - chunk.num_fp8_layers) * kept.layer_bytes
        + chunk.num_fp8_layers * kept.fp8_layer_bytes
        + chunk.is_first * kept.embedding_bytes
        for chunk in chunks
    ]
    cast_weights = sum(chunk.num_fp8_parameters for chunk in chunks)
    heads = [chunk.is_last * kept.head_bytes for chunk in chunks]
    num_microbatches = batch.global_batch_size // (batch.micro_batch_size * parallel.data)
    in_flight = peak_in_flight(
        [sum(pair) for pair in zip(layers, heads, strict=True)],
        pp_rank=fullest.pp_rank,
        pp_size=parallel.pipeline,
        num_microbatches=num_microbatches,
    )
    activations, loss_head = (
        sum(count * size for count, size in zip(in_flight, sizes, strict=True))
        for sizes in (layers, heads)
    )
    working = kept.working_bytes(is_last=any(chunk.is_last for chunk in chunks))
    optimizer_bytes = optimizer_bytes_per_parameter(
        recipe, distributed=parallel.distributed_optimizer
    )
    return StageMemory(
        pp_rank=fullest.pp_rank,
        layers=tuple(chunk.num_layers for chunk in chunks),
        in_flight=in_flight,
        num_parameters=num_parameters,
        weights=num_parameters * DTYPE_BYTES[recipe.precision.dtype]
        + FP8_CASTS_BYTES * cast_weights,
        gradients=num_parameters * GRADIENT_BYTES,
        optimizer=round(num_parameters * optimizer_bytes),
        activations=activations,
        loss_head=loss_head,
        working=working,
        # Every model chunk has the micro-batch after its current one on the device.
        batch=(sum(in_flight) + 1 + len(in_flight)) * kept.batch_bytes,
        allowance=_allowance(recipe, activations + loss_head + working),
        gather=_weight_gather(recipe, chunks),
    )


def _weight_gather(recipe: Recipe, chunks: Sequence[ChunkShape]) -> WeightGather:
    parallel, element_bytes = recipe.parallel, DTYPE_BYTES[recipe.precision.dtype]
    ranks = parallel.data * parallel.context
    if not parallel.distributed_optimizer or ranks == 1:
        return WeightGather(0, 0, 0)
    plain = element_bytes * sum(chunk.num_parameters for chunk in chunks)
    saved, messages = 0, 0
    if parallel.fp8_param_gather:
        saved = (element_bytes - 1) * sum(chunk.num_fp8_parameters for chunk in chunks)
        with_some = [chunk.num_parameters for chunk in chunks if chunk.num_fp8_parameters]
        # If one rank's shard has no FP8 weight, all messages are as long as in bf16. A rank has its
        # own twice.
        messages = element_bytes * max(with_some, default=0) * (ranks + 1) // ranks
    received, plain_received = ((sent * (ranks - 1)) // ranks for sent in (plain - saved, plain))
    return WeightGather(received, plain_received, messages)


def _allowance(recipe: Recipe, churned_bytes: int) -> int:
    parallel = recipe.parallel
    axes = (parallel.tensor, parallel.pipeline, parallel.context, parallel.data)
    # In addition to one group per axis in use: all ranks, one model copy, data with context.
    groups = sum(size > 1 for size in axes) + 3
    return CONTEXT_BYTES + groups * NCCL_GROUP_BYTES + round(FRAGMENTATION * churned_bytes)
