"""Phi-4 as a megatron-core GPTModel: build and initialise this rank's chunks.

Initial weights are sampled as full tensors per parameter from a generator seeded by (seed, global
name), and then sliced, on the CPU: the same seed gives the same model on every platform and in
every layout.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from phi4_kernels.dispatch import Choice

from phi4.config import ModelConfig, ParallelConfig, Recipe
from phi4.engine.layout import Layout
from phi4.engine.model.alternatives import LabelLogProbs
from phi4.engine.model.fp8.layers import layer_linears
from phi4.engine.model.fp8.te_backend import megatron_settings
from phi4.engine.model.implementations import implementation_of
from phi4.engine.model.layer_spec import block_spec
from phi4.engine.model.loss_head import LossHead
from phi4.engine.model.micro_batch import MicroBatch
from phi4.engine.model.tensor_parts import full_shape, shard
from phi4.engine.precision import torch_dtype


class Phi4Model(GPTModel):
    """One model chunk; the last one returns log-probabilities of the labels instead of a loss."""

    def _postprocess(
        self, *, hidden_states: torch.Tensor, labels: MicroBatch | None, **others: object
    ) -> torch.Tensor | LabelLogProbs:
        """megatron-core's hook after the layers; `labels` is what our callers passed."""
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=None, **others)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        rows = labels.alternatives
        if rows is not None:
            hidden_states = rows.append(hidden_states)
            return rows.split(self.output_layer(hidden_states, weight, labels=rows.labels_1X)[0])
        log_probs_BS, _ = self.output_layer(
            hidden_states, weight, labels=labels.labels_BS, loss_mask=labels.loss_mask_BS
        )
        return LabelLogProbs(log_probs_BS, None)

    def run(self, batch: MicroBatch, *, labelled: bool) -> torch.Tensor | LabelLogProbs:
        """Run the forward pass of this chunk.

        Args:
            batch: the micro-batch.
            labelled: return the last chunk's log-probabilities of the labels instead of its logits.

        Returns:
            hidden states for the next stage; on the last chunk log-probabilities, or logits
            [B, S, V / tp].
        """
        labels = batch if labelled else None
        return self(batch.tokens_BS, None, None, labels=labels, packed_seq_params=batch.documents)


def transformer_config(recipe: Recipe, *, frees_stage_outputs: bool) -> TransformerConfig:
    """Convert the recipe to megatron-core's config.

    Args:
        recipe: the run.
        frees_stage_outputs: release a stage's output once it is sent. Safe if sends are ordered by
            a stream; gloo still reads the buffer while an overlapped send is in progress.
    """
    model, parallel = recipe.model, recipe.parallel
    dtype = torch_dtype(recipe.precision)
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
        # initialise() below samples the weights; megatron only allocates and marks them.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        cuda_graph_scope=[],
        deallocate_pipeline_outputs=frees_stage_outputs and parallel.pipeline > 1,
        **_pipeline(parallel, model),
        **_recompute(recipe),
        **megatron_settings(recipe.precision),
    )


def build_chunks(
    recipe: Recipe, layout: Layout, config: TransformerConfig, choices: Sequence[Choice] = ()
) -> list[Phi4Model]:
    """Build this pipeline rank's model chunks, allocated and not yet initialised; see
    `block_spec`."""
    chunks = []
    for index in range(layout.vpp_size):
        vp_stage = index if layout.vpp_size > 1 else None
        before = get_transformer_layer_offset(config, vp_stage)
        built = range(before, before + get_num_layers_to_build(config, vp_stage=vp_stage))
        first = layout.pp_rank == 0 and index == 0
        last = layout.is_last_stage and index == layout.vpp_size - 1
        chunk = Phi4Model(
            config,
            block_spec(layer_linears(recipe, built, layout.groups.cp, choices), choices),
            vocab_size=recipe.model.vocab_size,
            max_sequence_length=recipe.data.sequence_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
            pg_collection=layout.groups,
            vp_stage=vp_stage,
        )
        if last:
            implementation = implementation_of("cross_entropy", choices)
            LossHead.take_over(chunk.output_layer, recipe.loss_head, implementation)
        chunks.append(chunk)
    return chunks


def global_parameters(chunks: list[Phi4Model]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (name, parameter) with global layer numbers."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), parameter


@torch.no_grad()
def initialise(chunks: list[Phi4Model], model: ModelConfig, seed: int, layout: Layout) -> None:
    """Initialise the weights: normal, output projections scaled by 1 / sqrt(2 L), norms one.

    Source: the report does not specify it; the scaling is GPT-2's (Radford et al. 2019, section
    2.3).
    """
    for name, parameter in global_parameters(chunks):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = model.init_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * model.num_layers)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.empty(full_shape(parameter, layout.tp_size)).normal_(
            0.0, std, generator=generator
        )
        parameter.copy_(shard(whole, parameter, layout))


def seed_random_states(seed: int) -> None:
    """Seed megatron-core's named random states (no op of Phi-4 uses them)."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _pipeline(parallel: ParallelConfig, model: ModelConfig) -> dict[str, object]:
    options: dict[str, object] = {
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": (
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        "overlap_p2p_comm": parallel.overlap_p2p,
        "batch_p2p_comm": not parallel.overlap_p2p,
        # Otherwise the host waits for the device after every exchange: a workaround for older
        # torch.
        "batch_p2p_sync": False,
    }
    if parallel.layers_per_stage is not None and parallel.pipeline > 1:
        stages = [["decoder"] * count for count in parallel.layers_per_stage]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        options["pipeline_model_parallel_layout"] = stages
    return options


def _recompute(recipe: Recipe) -> dict[str, object]:
    granularity = recipe.recompute.granularity
    if granularity == "none":
        return {}
    if granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
