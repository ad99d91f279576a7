"""Map tensor names and layouts between megatron-core and Hugging Face's Phi3, one to one.

All nine kinds have the same shape on both sides. Only QKV differs inside: megatron-core groups its
rows per KV head, [q .. q, k, v] for each, so that a tensor rank's slice is contiguous; Hugging Face
blocks them as [Q | K | V]. `gate_up` is [gate | up] on both.
"""

import re
from collections.abc import Iterator

import torch

from phi4.config import ModelConfig
from phi4.errors import CheckpointError
from phi4.model.shape import GROUP_OF_ROLE, ParameterGroup, Role, tensor_kinds

# Shape legend: H hidden, R rows of QKV, G KV heads, D head dim, Q queries of one KV head x D.

_NAMES: dict[Role, tuple[str, str]] = {
    "embedding": ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    "input_norm": (
        "decoder.layers.{}.input_layernorm.weight",
        "model.layers.{}.input_layernorm.weight",
    ),
    "qkv": (
        "decoder.layers.{}.self_attention.linear_qkv.weight",
        "model.layers.{}.self_attn.qkv_proj.weight",
    ),
    "attention_out": (
        "decoder.layers.{}.self_attention.linear_proj.weight",
        "model.layers.{}.self_attn.o_proj.weight",
    ),
    "mlp_norm": (
        "decoder.layers.{}.pre_mlp_layernorm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
    ),
    "gate_up": (
        "decoder.layers.{}.mlp.linear_fc1.weight",
        "model.layers.{}.mlp.gate_up_proj.weight",
    ),
    "down": ("decoder.layers.{}.mlp.linear_fc2.weight", "model.layers.{}.mlp.down_proj.weight"),
    "final_norm": ("decoder.final_layernorm.weight", "model.norm.weight"),
    "head": ("output_layer.weight", "lm_head.weight"),
}
_BY_MEGATRON: dict[str, Role] = {megatron: role for role, (megatron, _) in _NAMES.items()}
_BY_HF: dict[str, Role] = {hf: role for role, (_, hf) in _NAMES.items()}


def megatron_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by megatron-core name, in model order."""
    return {names[0]: shape for names, shape in _tensors(model)}


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by Hugging Face name, in model order."""
    return {names[1]: shape for names, shape in _tensors(model)}


def hf_name(name: str) -> str:
    """Return the Hugging Face name of a megatron-core tensor.

    Raises:
        CheckpointError: Phi-4 has no such tensor.
    """
    role, layer = _role_of(name, _BY_MEGATRON)
    return _NAMES[role][1].format(layer)


def megatron_name(name: str) -> str:
    """Return the megatron-core name of a Hugging Face tensor.

    Raises:
        CheckpointError: Phi-4 has no such tensor.
    """
    role, layer = _role_of(name, _BY_HF)
    return _NAMES[role][0].format(layer)


def parameter_group(name: str) -> ParameterGroup:
    """Return the parameter group of a megatron-core tensor.

    Raises:
        CheckpointError: Phi-4 has no such tensor.
    """
    return GROUP_OF_ROLE[_role_of(name, _BY_MEGATRON)[0]]


def to_hf(name: str, tensor: torch.Tensor, model: ModelConfig) -> tuple[str, torch.Tensor]:
    """Return name and rows of a full (unsplit) megatron-core tensor in Hugging Face's layout."""
    if _role_of(name, _BY_MEGATRON)[0] == "qkv":
        tensor = block_qkv(tensor, model)
    return hf_name(name), tensor


def to_megatron(name: str, tensor: torch.Tensor, model: ModelConfig) -> tuple[str, torch.Tensor]:
    """Return name and rows of a Hugging Face tensor in megatron-core's layout, unsplit."""
    if _role_of(name, _BY_HF)[0] == "qkv":
        tensor = group_qkv(tensor, model)
    return megatron_name(name), tensor


def block_qkv(grouped_RH: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Reorder rows [q .. q, k, v] per KV head to [Q | K | V]; exact inverse of `group_qkv`.

    Raises:
        CheckpointError: the number of rows is not the model's.
    """
    _check_rows(grouped_RH, model)
    groups, dim = model.num_key_value_heads, model.head_dim
    queries = model.num_attention_heads // groups * dim
    x_GRH = grouped_RH.unflatten(0, (groups, queries + 2 * dim))
    return torch.cat([part.flatten(0, 1) for part in x_GRH.split([queries, dim, dim], dim=1)])


def group_qkv(blocked_RH: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Reorder rows [Q | K | V] to [q .. q, k, v] per KV head; exact inverse of `block_qkv`.

    Raises:
        CheckpointError: the number of rows is not the model's.
    """
    _check_rows(blocked_RH, model)
    groups, dim = model.num_key_value_heads, model.head_dim
    sizes = [model.num_attention_heads * dim, groups * dim, groups * dim]
    parts = [part.unflatten(0, (groups, -1)) for part in blocked_RH.split(sizes)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _check_rows(qkv_RH: torch.Tensor, model: ModelConfig) -> None:
    rows = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    if qkv_RH.dim() != 2 or qkv_RH.shape[0] != rows:
        raise CheckpointError(
            f"a QKV matrix has shape {list(qkv_RH.shape)}, expected {rows} rows of width "
            f"{model.hidden_size}; give full tensors of the recipe's model"
        )


def _tensors(model: ModelConfig) -> Iterator[tuple[tuple[str, str], tuple[int, ...]]]:
    embedding, *layer_kinds, final_norm, head = tensor_kinds(model)
    yield _NAMES[embedding.role], embedding.shape
    for layer in range(model.num_layers):
        for kind in layer_kinds:
            megatron, hf = _NAMES[kind.role]
            yield (megatron.format(layer), hf.format(layer)), kind.shape
    for kind in (final_norm, head):
        yield _NAMES[kind.role], kind.shape


def _role_of(name: str, roles: dict[str, Role]) -> tuple[Role, str]:
    match = re.search(r"\.layers\.(\d+)\.", name)
    template = name if match is None else f"{name[: match.start(1)]}{{}}{name[match.end(1) :]}"
    if template not in roles:
        known = ", ".join(roles)
        raise CheckpointError(f"tensor {name!r} is not a Phi-4 tensor; expected one of {known}")
    return roles[template], match[1] if match else ""
