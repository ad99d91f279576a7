"""transformers' configuration of a model of ours."""

from typing import Any

from transformers import Phi3Config

from phi4.config import ModelConfig


def phi3_config(model: ModelConfig, **settings: Any) -> Phi3Config:
    """Phi3Config of the same shape; settings are added to it."""
    return Phi3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        max_position_embeddings=model.max_position_embeddings,
        original_max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_theta=model.rope_theta,
        **{"pad_token_id": 0} | settings,
    )
