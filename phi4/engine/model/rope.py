"""cos and sin of RoPE: one table of all positions, or one per token of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from phi4_kernels.dispatch import Choice

from phi4.config import ModelConfig, Recipe
from phi4.engine.model.implementations import implementation_of

# Shape legend: B rows, S local columns, D head dim, D2 half of it, P positions.


@dataclass(frozen=True)
class RopeCache:
    """cos and sin of every position, fp32, for RoPE with lookup."""

    cos_PD2: torch.Tensor
    sin_PD2: torch.Tensor

    @classmethod
    def up_to(cls, num_positions: int, model: ModelConfig, device: torch.device) -> "RopeCache":
        """Return positions [0, num_positions), with the angles of `rope_cos_sin`, so that all
        implementations compute the same model."""
        angles_PD2 = _angles(torch.arange(num_positions, device=device).float(), model)
        return cls(angles_PD2.cos(), angles_PD2.sin())

    @property
    def num_positions(self) -> int:
        """Number of positions in the cache."""
        return self.cos_PD2.shape[0]


def rope_cos_sin(
    positions_BS: torch.Tensor, model: ModelConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the rotary angles, [S, B, D], both halves equal (NeoX form).

    RopeCache in fp32, cast last. Source: RoFormer, section 3.2.2; halves as in GPT-NeoX.
    """
    angles_SBD2 = _angles(positions_BS.t(), model)
    angles_SBD = torch.cat((angles_SBD2, angles_SBD2), dim=-1)
    return angles_SBD.cos().to(dtype), angles_SBD.sin().to(dtype)


def _angles(positions: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Return rotary angles of fp32 positions, with an additional dimension of D / 2."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies_D2 = 1.0 / (model.rope_theta ** (exponents / model.head_dim))
    return positions.unsqueeze(-1) * frequencies_D2


def rope_cache(recipe: Recipe, choices: Sequence[Choice], device: torch.device) -> RopeCache | None:
    """Return the cache of all positions in a row, if the chosen RoPE uses one."""
    if implementation_of("rope", choices) == "torch":
        return None
    longest = max(recipe.data.sequence_length, recipe.model.max_position_embeddings)
    return RopeCache.up_to(longest, recipe.model, device)
