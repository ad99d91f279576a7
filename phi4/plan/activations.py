"""Bytes that a micro-batch keeps between its forward and its backward pass, term by term.

Storages are counted, not tensors: a view keeps its entire storage alive. The terms follow what
engine/layers.py, engine/attention.py and engine/loss_head.py save on a CUDA device; a test runs
these modules under `saved_tensors_hooks` and finds the same number of bytes.

With t tokens of a row slice, r = t / tp under sequence parallelism (else t), e bytes per element,
and h, q, kv, f the widths of hidden state, queries, keys and SwiGLU on this tensor rank, a layer
without recompute keeps

    4 r h e   inputs and outputs of the two norms (the outputs are the column linears' inputs)
    8 r       one fp32 statistic per norm
    3 t (q + kv) e   packed QKV, its rotated queries and keys, a copy of the queries
    t q e     input of the output projection
    4 t f e   gate and up, silu(gate), their product

and the log-sum-exp of core attention, 4 bytes per token and head; its output is the projection's
input. Context parallelism keeps no more: what other ranks hold is fetched again. Without it, rows
of one document in fp32 may go to torch's unfused attention; that bound is used: fp32 probabilities
and copies of queries, keys and values instead of the packed ones. Selective recompute keeps the
layer without what core attention saves, full recompute keeps r h e.

A layer whose linears multiply in FP8 keeps their inputs in it, one byte an element, and their
scales: instead of e bytes those of the norms' outputs and of SwiGLU's product; also that of
core attention's output where core attention keeps its output, too.
"""

from dataclasses import dataclass

from phi4.config import Recipe
from phi4.config.fp8_rules import FP8_BLOCK
from phi4.model.shape import DTYPE_BYTES

_FP32 = 4
_WIDENED_LOGITS = 1 << 24
"""Logits that torch's form of the loss holds in fp32 at a time."""


@dataclass(frozen=True)
class Activations:
    """What one rank keeps and needs, all in bytes for one micro-batch, from a recipe."""

    recipe: Recipe

    @property
    def row_tokens(self) -> int:
        """Tokens of one row on this context rank."""
        return self.recipe.data.sequence_length // self.recipe.parallel.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this context rank (t above)."""
        return self.row_tokens * self.recipe.batch.micro_batch_size

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation."""
        return DTYPE_BYTES[self.recipe.precision.dtype]

    @property
    def residual_tokens(self) -> int:
        """Tokens whose hidden state this tensor rank holds between the parallel linears (r)."""
        parallel = self.recipe.parallel
        return self.tokens // parallel.tensor if parallel.sequence else self.tokens

    @property
    def residual_bytes(self) -> int:
        """A hidden state as it travels between layers and stages."""
        return self.residual_tokens * self.recipe.model.hidden_size * self.element_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes kept per layer under the recipe's recompute mode."""
        granularity = self.recipe.recompute.granularity
        if granularity == "full":
            return self.residual_bytes
        if granularity == "selective":
            return self._outside_core_bytes + self._core_inputs_bytes
        return self._whole_layer_bytes

    @property
    def fp8_layer_bytes(self) -> int:
        """Bytes kept per layer whose linears run in FP8; equals layer_bytes without FP8, and as an
        upper bound with Transformer Engine's linears."""
        if self.recipe.precision.fp8 != "torch" or self.recipe.recompute.granularity == "full":
            return self.layer_bytes
        return self.layer_bytes + self._fp8_difference_bytes

    @property
    def embedding_bytes(self) -> int:
        """Bytes kept by the embedding: with a split vocabulary, local ids and the mask of ids on
        other ranks."""
        return 0 if self.recipe.parallel.tensor == 1 else 9 * self.tokens

    @property
    def head_bytes(self) -> int:
        """Bytes kept by final norm and loss head: its inputs or their gradient, and logits that are
        kept.

        Kept logits make up nearly all of it; computed in chunks, they leave a few numbers per
        token.
        """
        norm = 2 * self.residual_bytes + _FP32 * self.residual_tokens
        # Several rows are copied into the order of the logits.
        is_copied = self.recipe.batch.micro_batch_size > 1
        if self.recipe.loss_head.form == "one_pass":
            return norm + is_copied * _FP32 * self.tokens
        is_whole = self.recipe.loss_head.form == "logits"
        logits = is_whole * self.element_bytes * self.num_logits
        labels, normalizer = is_copied * 8 * self.tokens, 3 * _FP32 * self.tokens
        return norm + logits + labels + normalizer

    @property
    def num_logits(self) -> int:
        """Logits of a micro-batch on this tensor rank."""
        return self.tokens * self.recipe.model.vocab_size // self.recipe.parallel.tensor

    @property
    def batch_bytes(self) -> int:
        """Bytes of a micro-batch on the device: ids, labels, mask, positions, cosines and sines.

        Documents add 12 bytes each, which is ignored.
        """
        tables = 2 * self.recipe.model.head_dim * self.element_bytes
        return self.tokens * (8 + 8 + 4 + 4 + tables)

    def working_bytes(self, *, is_last: bool) -> int:
        """Upper bound of temporary memory while one layer or the loss head runs.

        Gradients of one layer's activations and of its largest matrix, recomputed activations, the
        gathered input under sequence parallelism, keys and values in transfer between context
        ranks, and the buffers of pipeline sends.
        """
        parallel = self.recipe.parallel
        gathered = self.tokens * self.recipe.model.hidden_size * self.element_bytes
        always = gathered if parallel.sequence else 0
        always += 4 * self.residual_bytes if parallel.pipeline > 1 else 0
        layer = self._recomputed_bytes + self._layer_gradient_bytes
        return always + max(layer, self._head_working_bytes if is_last else 0)

    @property
    def _layer_gradient_bytes(self) -> int:
        width = self._ffn
        matrix = 2 * width * self.recipe.model.hidden_size
        swiglu_and_hidden = self.tokens * (5 * width + 2 * self.recipe.model.hidden_size)
        # The gradients of the probabilities and of the scores.
        scores = 0 if self._is_fused else 2 * _FP32 * self._scores
        travelling = self._travelling_bytes if self.recipe.parallel.context > 1 else 0
        always = self.element_bytes * (matrix + swiglu_and_hidden) + self._fp8_working_bytes
        return always + scores + travelling

    @property
    def _travelling_bytes(self) -> int:
        """Return the bytes of keys, values and their gradients in transfer between context ranks,
        in backward."""
        both, element = 2 * self._keys * self.tokens, self.element_bytes
        if self.recipe.parallel.context_attention == "all_gather":
            # In the order of ranks and of rows; the gradient of each chunk, their sum and its copy.
            return self.recipe.parallel.context * both * (3 * element + 2 * _FP32)
        # The current block and the next, gradients of the current one, those being sent and
        # received, and the sum of the queries' gradients.
        return both * (3 * element + 3 * _FP32) + _FP32 * self._queries * self.tokens

    @property
    def _head_working_bytes(self) -> int:
        # The gradient of the logits reuses their memory, so that only the linear's is added.
        # torch's implementation of the loss upcasts a slice of the logits, twice; a kernel needs no
        # copy.
        hidden = self.tokens * self.recipe.model.hidden_size * self.element_bytes
        columns = self.recipe.model.vocab_size // self.recipe.parallel.tensor
        if self.recipe.loss_head.form == "logits":
            matrix = self.element_bytes * self.recipe.model.hidden_size * columns
            return max(2 * _FP32 * min(self.num_logits, _WIDENED_LOGITS), matrix + hidden)
        # The weight's gradient is written to megatron-core's buffer.
        chunk = min(self.recipe.loss_head.chunk_tokens, self.tokens) * columns
        return hidden + self.element_bytes * chunk + 2 * _FP32 * min(chunk, _WIDENED_LOGITS)

    @property
    def _recomputed_bytes(self) -> int:
        granularity = self.recipe.recompute.granularity
        if granularity == "full":
            return self._whole_layer_bytes - self.residual_bytes
        if granularity == "none":
            return 0
        # Several rows are first copied into one sequence; that copy is no larger than the inputs.
        outputs = self.tokens * self._queries * self.element_bytes
        return self._core_bytes + self._core_inputs_bytes + outputs

    @property
    def _whole_layer_bytes(self) -> int:
        inputs = self._core_inputs_bytes if self._is_fused else 0
        return self._outside_core_bytes + inputs + self._core_bytes

    @property
    def _fp8_difference_bytes(self) -> int:
        """Return the bytes of the linears' inputs in FP8 minus those without FP8."""
        of_norms = 2 * self.residual_tokens * self.recipe.model.hidden_size
        product, attended = self.tokens * self._ffn, self.tokens * self._queries
        # Fused attention keeps its own copy of its output.
        is_kept = self._is_fused and self.recipe.recompute.granularity == "none"
        replaced = of_norms + product + (0 if is_kept else attended)
        return of_norms + product + attended + self._scale_bytes - self.element_bytes * replaced

    @property
    def _scale_bytes(self) -> int:
        """Return the bytes of the inputs' scales, cast along the tokens for the weights'
        gradients."""
        widths = 2 * self.recipe.model.hidden_size, self._ffn + self._queries
        match self.recipe.precision.fp8_recipe:
            case "rowwise":
                return _FP32 * sum(widths)
            case "blockwise":
                blocks = self.residual_tokens // FP8_BLOCK, self.tokens // FP8_BLOCK
                counts = (width * count for width, count in zip(widths, blocks, strict=True))
                return _FP32 * sum(counts)
        # One scale per matrix.
        return 0

    @property
    def _fp8_working_bytes(self) -> int:
        """Return the bytes used while a matrix is cast: values, their scaled and their clamped
        form, in fp32."""
        if self.recipe.precision.fp8 == "off":
            return 0
        width = 2 * self._ffn
        return 3 * _FP32 * width * max(self.tokens, self.recipe.model.hidden_size)

    @property
    def _outside_core_bytes(self) -> int:
        norms = 4 * self.residual_bytes + 2 * _FP32 * self.residual_tokens
        swiglu = 4 * self.tokens * self._ffn * self.element_bytes
        projection = self.tokens * self._queries * self.element_bytes
        return norms + swiglu + projection

    @property
    def _core_inputs_bytes(self) -> int:
        packed_and_rotated = 2 * self._queries + 3 * self._keys
        # The queries of a single group are contiguous among the rotated ones; those of several are
        # copied.
        is_copied = self.recipe.model.num_key_value_heads > self.recipe.parallel.tensor
        queries = self._queries if is_copied else 0
        return self.tokens * (packed_and_rotated + queries) * self.element_bytes

    @property
    def _core_bytes(self) -> int:
        """Return the bytes that core attention saves in addition to its inputs."""
        if self._is_fused:
            return _FP32 * self.tokens * self._heads
        copies = 3 * self._queries * self.tokens
        return _FP32 * (self._scores + copies)

    @property
    def _is_fused(self) -> bool:
        return self.recipe.precision.dtype == "bf16" or self.recipe.parallel.context > 1

    @property
    def _scores(self) -> int:
        """Return the bytes of scores of rows that hold one document each."""
        return self._heads * self.tokens * self.row_tokens

    @property
    def _heads(self) -> int:
        return self.recipe.model.num_attention_heads // self.recipe.parallel.tensor

    @property
    def _queries(self) -> int:
        return self._heads * self.recipe.model.head_dim

    @property
    def _keys(self) -> int:
        model = self.recipe.model
        return model.num_key_value_heads * model.head_dim // self.recipe.parallel.tensor

    @property
    def _ffn(self) -> int:
        return self.recipe.model.intermediate_size // self.recipe.parallel.tensor
