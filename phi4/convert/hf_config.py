"""Read and write `config.json` and `generation_config.json` of a Phi3 model.

The RoPE base and the dtype are written under both of their keys: transformers 5 reads
`rope_parameters` and `dtype`; version 4 reads `rope_theta` and `torch_dtype` and silently uses
10,000 if it finds no base. Reading is strict for the same reason: a feature that our model does not
support, or two keys that contradict each other, raise an error with the reason.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from phi4.config import ModelConfig
from phi4.errors import ConfigError
from phi4.model.shape import Dtype

_HF_DTYPE: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}
# From the released config. Without a tokenizer class, 4.57.6 takes the tokenizer for Mistral's and
# warns that its split is wrong.
_FORMAT_VERSION = "4.47.0"
# Hugging Face's key: our key. The first group has no safe default.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}
_OPTIONAL = {"rms_norm_eps": "rms_norm_eps", "initializer_range": "init_std"}


def hf_config(
    model: ModelConfig, *, dtype: Dtype, bos_id: int, eos_id: int, pad_id: int
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        model: the shape.
        dtype: dtype of the stored weights.
        bos_id: document separator.
        eos_id: end of a turn.
        pad_id: differs from `eos_id`, or padding would hide the stop token from a later loss.
    """
    rope_theta = model.rope_theta
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "dtype": _HF_DTYPE[dtype],
        "embd_pdrop": 0.0,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": "phi3",
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_key_value_heads,
        "original_max_position_embeddings": model.max_position_embeddings,
        "pad_token_id": pad_id,
        "resid_pdrop": 0.0,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": _HF_DTYPE[dtype],
        "transformers_version": _FORMAT_VERSION,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def hf_generation_config(*, bos_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """Return the content of generation_config.json: generation stops at the end of a document or
    turn."""
    return {
        "bos_token_id": bos_id,
        "eos_token_id": [bos_id, eos_id],
        "pad_token_id": pad_id,
    }


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Return the model shape that a config.json describes.

    Raises:
        ConfigError: a key is missing or has a wrong value, or the model does something that Phi-4
            does not; all reasons at once.
    """
    reasons = list(_refusals(raw))
    if reasons:
        raise ConfigError("config.json: " + "; ".join(reasons))
    fields = {ours: raw[theirs] for theirs, ours in _REQUIRED.items()}
    fields |= {ours: raw[theirs] for theirs, ours in _OPTIONAL.items() if theirs in raw}
    heads = raw.get("num_key_value_heads")
    fields["num_key_value_heads"] = raw["num_attention_heads"] if heads is None else heads
    fields["rope_theta"] = _rope_bases(raw)[0]
    try:
        model = ModelConfig.model_validate(fields, strict=True)
    except ValidationError as error:
        lines = [f"{item['loc'][0]}={item['input']!r}: {item['msg']}" for item in error.errors()]
        raise ConfigError("config.json: " + "; ".join(lines)) from None
    _check_heads(model, raw.get("head_dim"))
    return model


def _refusals(raw: Mapping[str, Any]) -> Iterator[str]:
    if raw.get("model_type") != "phi3":
        yield (
            f"model_type={raw.get('model_type')!r}, expected 'phi3'; other model types are not "
            f"supported"
        )
    for key in _REQUIRED:
        if key not in raw:
            yield f"{key} is missing; add it"
    for key, wanted in (
        ("hidden_act", "silu"),
        ("tie_word_embeddings", False),
        ("attention_bias", False),
    ):
        if raw.get(key, wanted) != wanted:
            yield (
                f"{key}={raw[key]!r}, but Phi-4 has {key}={wanted!r}; this is not a Phi-4 "
                f"architecture"
            )
    yield from _rope_refusals(raw)
    window, longest = raw.get("sliding_window"), raw.get("max_position_embeddings")
    if window is not None and not _at_least(window, longest):
        yield (
            f"sliding_window={window!r} is below max_position_embeddings={longest!r}, but Phi-4 "
            f"uses full attention; set it to null if the model was trained without a window"
        )


def _rope_refusals(raw: Mapping[str, Any]) -> Iterator[str]:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key), dict | None):
            yield f"{key}={raw[key]!r}, expected a table or null"
        rope = _table(raw, key)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            yield (
                f"{key} is of type {kind!r}, but Phi-4's RoPE is unscaled; this is not a Phi-4 "
                f"architecture"
            )
    for table in (raw, _table(raw, "rope_parameters")):
        part = table.get("partial_rotary_factor")
        if part not in (None, 1):
            yield (
                f"partial_rotary_factor={part!r}, but Phi-4 rotates all dimensions of a head; "
                f"expected 1.0"
            )
    bases = _rope_bases(raw)
    if not bases:
        yield (
            "no RoPE base under rope_parameters.rope_theta or rope_theta; add the base used in "
            "training"
        )
    if any(base != bases[0] for base in bases):
        yield (
            f"the keys of the RoPE base disagree: {' and '.join(map(str, bases))}; make them equal"
        )


def _rope_bases(raw: Mapping[str, Any]) -> list[Any]:
    tables = (_table(raw, "rope_parameters"), _table(raw, "rope_scaling"), raw)
    return [table["rope_theta"] for table in tables if table.get("rope_theta") is not None]


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _at_least(value: object, bound: object) -> bool:
    return isinstance(value, int) and isinstance(bound, int) and value >= bound


def _check_heads(model: ModelConfig, head_dim: int | None) -> None:
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if model.hidden_size % heads or heads % kv_heads:
        raise ConfigError(
            f"config.json: hidden_size={model.hidden_size}, num_attention_heads={heads} and "
            f"num_key_value_heads={kv_heads} are inconsistent: num_attention_heads must divide "
            f"hidden_size, and num_key_value_heads must divide num_attention_heads; the file is "
            f"damaged"
        )
    if head_dim is not None and head_dim != model.head_dim:
        raise ConfigError(
            f"config.json: head_dim={head_dim}, but Phi-4 has hidden_size / num_attention_heads = "
            f"{model.head_dim}; this is not a Phi-4 architecture"
        )
