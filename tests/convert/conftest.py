"""A tiny Phi-4 with random weights, and its two tokenizers."""

import os
from pathlib import Path

import pytest
import torch

from phi4.config import ModelConfig, TokenizerConfig
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import Tokenizer, load_tokenizer
from phi4.model.names import megatron_shapes

_ROOT = Path(__file__).parents[2]
_TEXTS = [
    Path(os.__file__).read_text(encoding="utf-8"),
    "naïve Straße 你好，世界 привет 123456 you're they'll\n\n\t\tdef f(x):\n" * 40,
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(_TEXTS, 1024))


@pytest.fixture(scope="session")
def phi4_tokenizer() -> Tokenizer:
    """The real one; its ranks are read from disk, never downloaded by a test."""
    directories = (os.environ.get("TIKTOKEN_CACHE_DIR"), _ROOT.parent / "shared" / "data")
    for directory in filter(None, directories):
        path = Path(directory) / "cl100k_base.tiktoken"
        if path.is_file():
            return load_tokenizer(TokenizerConfig(path=str(path)))
    pytest.skip("cl100k_base.tiktoken is not in TIKTOKEN_CACHE_DIR")


@pytest.fixture(scope="session")
def model() -> ModelConfig:
    return ModelConfig(
        num_layers=3,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=40,
        vocab_size=1088,
        max_position_embeddings=64,
        rope_theta=250_000.0,
        rms_norm_eps=1e-5,
    )


@pytest.fixture(scope="session")
def weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in megatron_shapes(model).items()
    }
