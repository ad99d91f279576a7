"""Token-by-token generation through the training layout: any TP x PP x CP, no KV cache.

Every rank computes the same tokens: the last stage draws, all others are told. Causal attention
makes the padding behind the text invisible, so rows are padded to whatever the layout needs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from phi4.engine.engine import Engine
from phi4.errors import ConfigError


class _Row:
    """One document, padded, in the form the engine takes."""

    def __init__(self, tokens: Sequence[int], length: int) -> None:
        self.tokens = np.zeros((1, length), dtype=np.int64)
        self.tokens[0, : len(tokens)] = tokens
        self.labels = np.zeros_like(self.tokens)
        self.loss_mask = np.zeros((1, length), dtype=np.float32)
        self.cu_seqlens = np.array([0, length], dtype=np.int32)
        self.positions = np.arange(length, dtype=np.int64)[None]


def generate(
    engine: Engine,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield the continuation's token ids, on every rank.

    Args:
        engine: any layout.
        prompt: token ids, at least one.
        max_tokens: at most this many new tokens.
        temperature: 0 takes the most likely token.
        seed: of the draws; the same seed gives the same text in every layout.
        stop_ids: end after one of these; it is yielded.

    Raises:
        ConfigError: the text would exceed the model's longest sequence, or the prompt is empty.

    Collectives: per token those of `Engine.logits` and one broadcast of an id over all ranks.
    """
    limit = engine.recipe.model.max_position_embeddings
    if not prompt:
        raise ConfigError("the prompt has no token; give at least one character")
    if len(prompt) + max_tokens > limit:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens and {max_tokens} new ones exceed the model's "
            f"{limit}; shorten the prompt or lower --max-tokens"
        )
    tokens = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        token = _next_token(engine, tokens, temperature, generator)
        yield token
        tokens.append(token)
        if token in stop_ids:
            return


def _next_token(
    engine: Engine, tokens: list[int], temperature: float, generator: torch.Generator
) -> int:
    multiple = engine.layout.sequence_multiple
    length = -(-len(tokens) // multiple) * multiple
    logits = engine.logits([_Row(tokens, length)])
    # Every rank draws, so that all generators stay in step; the last stage's draw is the one.
    noise = torch.rand(engine.recipe.model.vocab_size, generator=generator, dtype=torch.float64)
    choice = torch.zeros(1, dtype=torch.int64, device=engine.platform.device)
    if logits:
        scores_V = logits[0][0, len(tokens) - 1].double().cpu()
        if temperature > 0:
            # Gumbel-max draws from softmax(scores / temperature) with one uniform per token.
            scores_V = scores_V / temperature - (-noise.clamp_min(1e-300).log()).log()
        choice += int(scores_V.argmax())
    dist.broadcast(choice, src=engine.platform.world_size - 1)
    return int(choice)
