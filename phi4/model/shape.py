"""Phi-4's sizes: tensors, parameters, FLOPs and bytes, all computed from a `ModelConfig`.

One table, `tensor_kinds`, lists the nine kinds of tensor with their shapes and the dimension that
tensor parallelism splits; every count here and every name in `names.py` is derived from it, so
counts and checkpoints always agree.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from phi4.config import ModelConfig

Role = Literal[
    "embedding",
    "input_norm",
    "qkv",
    "attention_out",
    "mlp_norm",
    "gate_up",
    "down",
    "final_norm",
    "head",
]
ParameterGroup = Literal["embedding", "attention", "mlp", "norm", "head"]
Dtype = Literal["fp32", "bf16"]

GROUP_OF_ROLE: dict[Role, ParameterGroup] = {
    "embedding": "embedding",
    "input_norm": "norm",
    "qkv": "attention",
    "attention_out": "attention",
    "mlp_norm": "norm",
    "gate_up": "mlp",
    "down": "mlp",
    "final_norm": "norm",
    "head": "head",
}
"""Parameter groups whose gradient norms are reported separately."""
PARAMETER_GROUPS = tuple(dict.fromkeys(GROUP_OF_ROLE.values()))

DTYPE_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class TensorKind:
    """A kind of tensor: one per layer when `per_layer`, else one per model."""

    role: Role
    shape: tuple[int, ...]
    """Unsplit; matrices are [out, in]."""
    per_layer: bool
    split_dim: int | None
    """Dimension that tensor parallelism divides; None means every tensor rank holds a copy."""

    @property
    def num_parameters(self) -> int:
        """Elements of one tensor of this kind."""
        return prod(self.shape)

    def num_parameters_local(self, tp_size: int) -> int:
        """Elements that one tensor rank holds."""
        return self.num_parameters // (1 if self.split_dim is None else tp_size)


def tensor_kinds(model: ModelConfig) -> tuple[TensorKind, ...]:
    """Return the nine kinds of tensor, in the order in which the model applies them."""
    hidden, ffn, vocab = model.hidden_size, model.intermediate_size, model.vocab_size
    queries = model.num_attention_heads * model.head_dim
    keys_values = 2 * model.num_key_value_heads * model.head_dim
    return (
        TensorKind("embedding", (vocab, hidden), False, 0),
        TensorKind("input_norm", (hidden,), True, None),
        TensorKind("qkv", (queries + keys_values, hidden), True, 0),
        TensorKind("attention_out", (hidden, queries), True, 1),
        TensorKind("mlp_norm", (hidden,), True, None),
        TensorKind("gate_up", (2 * ffn, hidden), True, 0),
        TensorKind("down", (hidden, ffn), True, 1),
        TensorKind("final_norm", (hidden,), False, None),
        TensorKind("head", (vocab, hidden), False, 0),
    )


def num_layer_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of one transformer layer."""
    return sum(kind.num_parameters for kind in tensor_kinds(model) if kind.per_layer)


def num_parameters(model: ModelConfig) -> int:
    """Return the number of all parameters; embedding and head are two tensors."""
    return sum(
        kind.num_parameters * (model.num_layers if kind.per_layer else 1)
        for kind in tensor_kinds(model)
    )


def num_matmul_parameters(model: ModelConfig) -> int:
    """Return the number of parameters in matrix products of every token: the layers and the
    head."""
    return sum(
        kind.num_parameters * (model.num_layers if kind.per_layer else 1)
        for kind in tensor_kinds(model)
        if len(kind.shape) == 2 and kind.role != "embedding"
    )


def num_rank_parameters(
    model: ModelConfig, num_layers: int, tp_size: int, *, first: bool, last: bool
) -> int:
    """Return the number of parameters that one tensor rank of one pipeline stage holds.

    Args:
        model: the unsplit model.
        num_layers: layers of the stage, over all its virtual chunks.
        tp_size: width of the tensor group; divides every split dimension.
        first: the stage holds the embedding.
        last: the stage holds the final norm and the head.
    """
    copies = {"embedding": int(first), "final_norm": int(last), "head": int(last)}
    return sum(
        kind.num_parameters_local(tp_size) * (num_layers if kind.per_layer else copies[kind.role])
        for kind in tensor_kinds(model)
    )


class Work(NamedTuple):
    """The work that a model's FLOPs depend on."""

    num_tokens: int
    """Positions of the rows, padding included, because it is computed."""
    squared_lengths: int
    """Sum of the squares of the lengths of all documents. Attention ends at their boundaries, so a
    row that holds several costs less than one that holds a long one."""
    num_second_labels: int = 0
    """Positions that pass through the head once more, for the alternative label of a pivot."""


NO_WORK = Work(0, 0)


@dataclass(frozen=True, slots=True)
class TrainingFlops:
    """FLOPs of training, forward and backward: a multiply-add counts as 2, backward as 2 forwards,
    recomputation, the look-up in the embedding and elementwise work as 0.
    """

    matmul: int
    attention_causal: int
    """Scores and weighted sum over the tokens that a causal mask leaves, half of the square."""
    attention_full: int
    """The same over the full square, as in PaLM's appendix B."""
    six_n: int
    """6 x all parameters, embedding included, no attention."""

    @property
    def causal(self) -> int:
        """The count that MFU is based on."""
        return self.matmul + self.attention_causal

    @property
    def full(self) -> int:
        """The count to compare with systems that ignore the mask."""
        return self.matmul + self.attention_full


def training_flops(model: ModelConfig, work: Work) -> TrainingFlops:
    """Return the FLOPs of one forward and backward pass over documents of any lengths.

    FLOPs are additive over pieces of work. The matrices take six FLOPs per parameter and token;
    scores and weighted sum of a document of s tokens take 12 * s^2 * width per layer, or half of it
    where the mask leaves half of the square.
    """
    width = model.num_attention_heads * model.head_dim
    full = 12 * model.num_layers * width * work.squared_lengths
    head = model.vocab_size * model.hidden_size * work.num_second_labels
    return TrainingFlops(
        matmul=6 * (num_matmul_parameters(model) * work.num_tokens + head),
        attention_causal=full // 2,
        attention_full=full,
        six_n=6 * num_parameters(model) * work.num_tokens,
    )


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> TrainingFlops:
    """Return the FLOPs per token when rows of `sequence_length` tokens hold one document each."""
    # FLOPs of a row are those of S tokens and S^2: S times these.
    return training_flops(model, Work(num_tokens=1, squared_lengths=sequence_length))


def kv_cache_bytes_per_token(model: ModelConfig, dtype: Dtype = "bf16") -> int:
    """Return the bytes of keys and values per token that generation keeps, over all layers."""
    values = 2 * model.num_layers * model.num_key_value_heads * model.head_dim
    return values * DTYPE_BYTES[dtype]


def weight_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Return the bytes of the weights alone, as in a checkpoint or an inference server."""
    return num_parameters(model) * DTYPE_BYTES[dtype]


def training_bytes_per_parameter(dtype: Dtype) -> int:
    """Return the bytes of weight, fp32 gradient and AdamW state of one parameter, unsharded.

    bf16 weights have an fp32 master copy in addition to the two moments; fp32 weights do not.
    """
    weight, gradient, moments = DTYPE_BYTES[dtype], 4, 8
    master = 0 if dtype == "fp32" else 4
    return weight + gradient + moments + master


def format_bytes(count: float) -> str:
    """Return `count` bytes in binary units, one decimal, for example `27.3 GiB`."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:,.1f} TiB"
