"""Token-by-token generation through the training layout: any TP x PP x CP, no KV cache.

Every rank yields the same tokens: the last stage draws, all others are told. Causal attention
makes the padding behind the text invisible, so rows are padded to whatever the layout needs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from phi4.data.stream.batch import Batch
from phi4.engine.engine import Engine
from phi4.errors import ConfigError


def generate(
    engine: Engine,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    vocab_size: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """Yield the continuation's token ids, on every rank.

    Args:
        engine: any layout.
        prompt: token ids, at least one.
        max_tokens: at most this many new tokens.
        temperature: 0 takes the most likely token.
        seed: sampling seed; the same seed gives the same text in every layout.
        vocab_size: ids of the tokenizer, none beyond them is drawn; the model's when None.
        stop_ids: end after one of these; it is yielded.

    Raises:
        ConfigError: the text would exceed the model's longest sequence, the prompt is empty, or the
            tokenizer has more ids than the model.

    Collectives: per token those of `Engine.logits` and one broadcast of an id over all ranks.
    """
    limit = engine.recipe.model.max_position_embeddings
    vocab_size = vocab_size or engine.recipe.model.vocab_size
    if vocab_size > engine.recipe.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} ids, model.vocab_size="
            f"{engine.recipe.model.vocab_size}; use the tokenizer of the training"
        )
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
        noise_V = torch.rand(vocab_size, generator=generator, dtype=torch.float64)
        token = _next_token(engine, tokens, temperature, noise_V)
        yield token
        tokens.append(token)
        if token in stop_ids:
            return


def _next_token(
    engine: Engine, tokens: list[int], temperature: float, noise_V: torch.Tensor
) -> int:
    layout = engine.layout
    length = -(-len(tokens) // layout.sequence_multiple) * layout.sequence_multiple
    # Interleaved 1F1B takes micro-batches in groups as large as the pipeline.
    copies = layout.pp_size if layout.vpp_size > 1 else 1
    logits = engine.logits([_row(tokens, length)] * copies)
    choice = torch.zeros(1, dtype=torch.int64, device=engine.platform.device)
    if logits:
        scores_V = logits[0][0, len(tokens) - 1, : len(noise_V)].double().cpu()
        if temperature > 0:
            # Gumbel-max draws from softmax(scores / temperature) with one uniform per token.
            scores_V = scores_V / temperature - (-noise_V.clamp_min(1e-300).log()).log()
        choice += int(scores_V.argmax())
    dist.broadcast(choice, src=engine.platform.world_size - 1)
    return int(choice)


def _row(tokens: list[int], length: int) -> Batch:
    """One document, padded."""
    padded = np.zeros((1, length), dtype=np.int64)
    padded[0, : len(tokens)] = tokens
    return Batch(
        tokens=padded,
        labels=np.zeros_like(padded),
        loss_mask=np.zeros((1, length), dtype=np.float32),
        cu_seqlens=np.array([0, length], dtype=np.int32),
        positions=np.arange(length, dtype=np.int64)[None],
    )
