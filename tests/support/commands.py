"""A model on disk and `phi4` commands on it, inside a rank of a pool: no process has to start."""

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from phi4.cli import main
from phi4.config import dump_toml
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import Tokenizer, rank_file_bytes
from phi4.engine.checkpoint import save_checkpoint
from phi4.engine.layout import destroy_layout
from tests.support.engines import engine_on, tiny_recipe
from tests.support.ranks import RankPool

LICENSE = Path(__file__).parents[2] / "LICENSE"
TEXT = "Every process has the same words: naïve Straße 你好 👩‍👩‍👧 def f(x): return x ** 2\n"


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command(pool: RankPool, *words: object, stdin: Path | None = None) -> Ended:
    """`phi4 WORDS` in one process, its stdin from a file or empty."""
    return pool.run(_command, [str(word) for word in words], stdin)[0]


def write_model(
    pool: RankPool, directory: Path, *overrides: str, text: str = TEXT * 8
) -> Tokenizer:
    """A run directory with a tiny model; its tokenizer, of whose text it knows nothing."""
    # A text that never changes, so that what the model draws does not either.
    tokenizer = Tokenizer(train_bpe([text, LICENSE.read_text(encoding="utf-8")], 512))
    (directory / "bpe.tiktoken").write_bytes(rank_file_bytes(tokenizer.mergeable_ranks))
    pool.run(_save, directory, tokenizer.vocab_size, overrides)
    return tokenizer


# What follows runs in the ranks.


def _command(rank: int, world_size: int, words: Sequence[str], stdin: Path | None) -> Ended | None:
    if rank:
        return None
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        open(stdin or "/dev/null", encoding="utf-8") as opened,
        mock.patch.object(sys, "stdin", opened),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            # A command that fails ends its process and leaves this to the end.
            destroy_layout()
    return Ended(code, out.getvalue(), err.getvalue())


def _save(
    rank: int, world_size: int, directory: Path, vocab_size: int, overrides: Sequence[str]
) -> None:
    recipe = tiny_recipe(
        f"model.vocab_size={vocab_size}",
        "tokenizer.kind=bpe",
        f"tokenizer.path={directory / 'bpe.tiktoken'}",
        *overrides,
    )
    files = {"recipe.toml": dump_toml(recipe)}
    root = directory / "checkpoints"
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is not None:
            save_checkpoint(engine, root, 0, form="none", keep=1, files=files, data={})
