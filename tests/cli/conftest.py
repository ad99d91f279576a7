"""A small finished run, and copies of it to damage."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from phi4.config import TokenizerConfig, dump_toml
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import TokenizerFacts, load_tokenizer, rank_file_bytes
from tests.support.engines import tiny_recipe
from tests.support.runs import train

_TEXT = "Wrong input to `phi4 train`: one clear line, exit code 2, nothing written over. "


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe, its data, and a run of two steps with two checkpoints.

    stdout.txt is what the run printed.
    """
    root = tmp_path_factory.mktemp("run")
    ranks = root / "bpe.tiktoken"
    ranks.write_bytes(rank_file_bytes(train_bpe([_TEXT * 9], 360)))
    tokenizer = TokenizerConfig(kind="bpe", path=str(ranks))
    _write_tokens(root / "tokens", load_tokenizer(tokenizer).facts)
    recipe = tiny_recipe(
        "run.dir=run",
        "run.steps=2",
        "checkpoint.every=1",
        "tokenizer.kind=bpe",
        "tokenizer.path=bpe.tiktoken",
        "model.vocab_size=360",
        "model.num_layers=2",
        "data.sources=[{name='a', path='tokens'}]",
    )
    (root / "recipe.toml").write_text(dump_toml(recipe))
    result = train(root)
    assert result.returncode == 0, result.stderr
    (root / "stdout.txt").write_text(result.stdout)
    return root


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    target = tmp_path / "copy"
    shutil.copytree(run, target)
    return target


def _write_tokens(prefix: Path, facts: TokenizerFacts, first_id: int = 1) -> None:
    random = np.random.default_rng(0)
    with TokenFileWriter(prefix, facts) as writer:
        for _ in range(40):
            body = random.integers(first_id, first_id + 200, 60)
            writer.add(np.append(body, facts.eod_id).astype(np.int32))
