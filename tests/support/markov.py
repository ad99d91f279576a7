"""A Phi-4 whose next-token probabilities are a given table of the last token.

Embeddings are one-hot, attention and MLP add nothing, and the head is the table's logarithm: the
probabilities are exact through the real engine.
"""

from collections.abc import Iterator

import torch

from phi4.config import Recipe
from phi4.engine.engine import Engine
from phi4.engine.model.gpt import global_parameters
from phi4.engine.model.tensor_parts import full_shape
from tests.support.engines import tiny_recipe

VOCAB_SIZE = 32


def markov_recipe(*overrides: str, vocab_size: int = VOCAB_SIZE) -> Recipe:
    """Hidden size and vocabulary are equal, so that a token is a direction."""
    sizes = (f"model.hidden_size={vocab_size}", f"model.vocab_size={vocab_size}")
    return tiny_recipe(*sizes, "model.num_layers=4", *overrides)


def table(seed: int = 0) -> torch.Tensor:
    """Log-probabilities [last token, next token], fp64; far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    return (2.0 * logits).log_softmax(-1)


def make_markov(engine: Engine, log_probs_VV: torch.Tensor) -> None:
    """Give this rank's chunks the weights of the table."""
    engine.load_whole_parameters(dict(_weights(engine, log_probs_VV)))


def _weights(engine: Engine, log_probs_VV: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    vocab_size = engine.recipe.model.vocab_size
    for name, parameter in global_parameters(engine.bare_chunks):
        whole = torch.zeros(full_shape(parameter, engine.layout.tp_size))
        if parameter.dim() == 1:
            whole.fill_(1.0)
        elif name.startswith("embedding"):
            whole = torch.eye(vocab_size)
        elif name.startswith("output_layer"):
            # The final norm divides a one-hot vector by this.
            scale = (1 / vocab_size + engine.recipe.model.rms_norm_eps) ** 0.5
            whole = (log_probs_VV.T * scale).float()
        yield name, whole
