"""transformers' form of a model of ours."""

from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM

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


def drawn_phi3(model: ModelConfig, generator: torch.Generator) -> Phi3ForCausalLM:
    """A model in evaluation whose weights are far from initial ones.

    Matrices have std 0.1 and norm weights lie between 0.5 and 1.5, so that no wrong norm, rotation
    or head order hides behind small numbers.
    """
    drawn = Phi3ForCausalLM(phi3_config(model, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in drawn.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.1, generator=generator)
    return drawn
