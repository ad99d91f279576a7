"""megatron-core's own training step, as a baseline: its GPTModel, its DDP, its optimizer.

Layers, loss and AdamW are what megatron-core has: the local layer spec, or Transformer Engine's.
Nothing of phi4 is patched in on a GPU. On a CPU megatron-core does not start without the changes
that place tensors there, so those of `Patches` are entered, and no others. On a GPU every fusion
whose extension is installed is on, as a user of megatron-core would have it; `settings` says which.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from phi4.config import Recipe
from phi4.data.stream.batch import Batch
from phi4.engine.layout import create_layout, destroy_layout
from phi4.engine.model.gpt import global_parameters, seed_random_states
from phi4.engine.optimizer.build import set_learning_rate
from phi4.engine.patches import PATCHES, Patches
from phi4.engine.platform import connect, disconnect
from phi4.engine.precision import torch_dtype

PLATFORM_PATCHES = frozenset({"current_device", "synchronize", "rng_state", "rng_tracker"})
"""Of phi4.engine.patches: what places megatron-core on a CPU. Arithmetic is left alone."""


class StockMegatron:
    """A training step of megatron-core on one process.

    Args:
        recipe: the model, the batch and the optimizer's constants.
        kind: cpu or cuda.
        weights: (megatron-core's global name, whole tensor) of every matrix.
        te: Transformer Engine's layers instead of the local ones.
    """

    def __init__(
        self,
        recipe: Recipe,
        kind: str,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        te: bool,
    ) -> None:
        self.recipe = recipe
        self.device = connect(kind, threads=recipe.run.threads).device
        self._context = _context(kind)
        with self._context:
            self.layout = create_layout(recipe.parallel)
            seed_random_states(recipe.run.seed)
            self.config = _transformer_config(recipe, kind, te=te)
            model = _model(self.config, recipe, te=te).to(self.device)
            _fill(model, weights)
            options = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=recipe.parallel.distributed_optimizer,
            )
            self.chunk = DistributedDataParallel(self.config, options, model)
            self.config.finalize_model_grads_func = finalize_model_grads
            options = _optimizer_config(recipe)
            self.optimizer = get_megatron_optimizer(
                options, [self.chunk], use_gloo_process_groups=False
            )
            # What megatron-core's OptimizerParamScheduler does in every step of a constant rate.
            set_learning_rate(self.optimizer, recipe.optim.learning_rate, recipe.optim.weight_decay)

    def __call__(self, batches: Sequence[Batch]) -> float:
        """One optimizer step over host batches; the mean loss."""
        with self._context:
            self.chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            rows, length = batches[0].tokens.shape
            reported = get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=iter(batches),
                model=self.chunk,
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=rows,
                forward_only=False,
            )
            self.optimizer.step()
            loss_sums, counts = zip(*(part["loss"] for part in reported), strict=True)
            return (sum(loss_sums) / sum(counts)).item()

    def settings(self) -> dict[str, object]:
        """Return what of megatron-core ran: the optimizer's class and the fusions."""
        adam = type(self.optimizer.chained_optimizers[0].optimizer)
        names = (
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "apply_rope_fusion",
            "gradient_accumulation_fusion",
            "cross_entropy_loss_fusion",
            "cross_entropy_fusion_impl",
        )
        fusions = {name: getattr(self.config, name) for name in names}
        return {"adam": f"{adam.__module__}.{adam.__qualname__}", **fusions}

    def close(self) -> None:
        """Forget megatron-core's process groups and leave the default one."""
        with self._context:
            destroy_layout()
        disconnect()

    def _forward(self, iterator: Iterator[Batch], model: torch.nn.Module):
        batch = next(iterator)

        def placed(array, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device, dtype, non_blocking=True)

        tokens_BS, labels_BS = (placed(x, torch.int64) for x in (batch.tokens, batch.labels))
        positions_BS = torch.arange(tokens_BS.shape[1], device=self.device).expand_as(tokens_BS)
        nll_BS = model(tokens_BS, positions_BS, None, labels=labels_BS)
        return nll_BS, partial(_loss, placed(batch.loss_mask, torch.float32))


def _loss(mask_BS: torch.Tensor, nll_BS: torch.Tensor):
    loss_sum = (nll_BS.float() * mask_BS).sum()
    count = mask_BS.sum().int()
    return loss_sum, count, {"loss": (loss_sum.detach(), count)}


def _context(kind: str) -> AbstractContextManager:
    if kind != "cpu":
        return nullcontext()
    return Patches("cpu", frozenset(patch.name for patch in PATCHES) - PLATFORM_PATCHES)


def _installed(*extensions: str) -> bool:
    return all(find_spec(name) is not None for name in extensions)


def _transformer_config(recipe: Recipe, kind: str, *, te: bool) -> TransformerConfig:
    model, dtype, fused = recipe.model, torch_dtype(recipe.precision), kind == "cuda"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.intermediate_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=fused
        and not te
        and _installed("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda"),
        gradient_accumulation_fusion=fused and _installed("fused_weight_gradient_mlp_cuda"),
        apply_rope_fusion=te,
        cross_entropy_loss_fusion=fused,
        cross_entropy_fusion_impl="te" if te else "native",
        cuda_graph_scope=[],
    )


def _model(config: TransformerConfig, recipe: Recipe, *, te: bool) -> GPTModel:
    spec = (
        get_gpt_layer_with_transformer_engine_spec()
        if te
        else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    return GPTModel(
        config,
        spec,
        vocab_size=recipe.model.vocab_size,
        max_sequence_length=recipe.data.sequence_length,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=recipe.model.rope_theta,
    )


@torch.no_grad()
def _fill(model: GPTModel, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Norms one, matrices from the stream; Transformer Engine has other names for norms only."""
    waiting = dict(global_parameters([model]))
    for name in [name for name, parameter in waiting.items() if parameter.dim() == 1]:
        waiting.pop(name).fill_(1.0)
    for name, tensor in weights:
        if tensor.dim() > 1:
            waiting.pop(name).copy_(tensor)
    if waiting:
        raise KeyError(f"no weights for {', '.join(sorted(waiting))}")


def _optimizer_config(recipe: Recipe) -> OptimizerConfig:
    optim, dtype = recipe.optim, torch_dtype(recipe.precision)
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
    )
