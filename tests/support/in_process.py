"""A tiny run and the command line on it, inside a rank of a pool: no process has to start."""

import contextlib
import io
from contextlib import chdir
from pathlib import Path

import numpy as np

from phi4.cli import main
from phi4.config import dump_toml
from phi4.data.files.token_writer import TokenFileWriter
from tests.support.byte_source import write_byte_tokenizer
from tests.support.engines import tiny_recipe


def write_recipe(root: Path, *overrides: str) -> None:
    """recipe.toml of a run of one step in `root`, its tokenizer and its tokens."""
    facts = write_byte_tokenizer(root)
    with TokenFileWriter(root / "tokens", facts) as writer:
        writer.add(np.append(np.arange(1999) % 250, facts.eod_id).astype(np.int32))
    recipe = tiny_recipe(
        *("run.dir=run", "run.steps=1", "tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken"),
        *("model.vocab_size=512", "model.num_layers=2", "data.sources=[{name='a',path='tokens'}]"),
        *overrides,
    )
    (root / "recipe.toml").write_text(dump_toml(recipe))


def phi4(rank: int, world_size: int, root: Path, argv: list[str]) -> tuple[int, str]:
    """Exit code and everything printed of a command of one rank."""
    from megatron.core import parallel_state

    from phi4.engine.platform import disconnect

    printed, code = io.StringIO(), 0
    with chdir(root), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            # A command that ends in an error leaves its groups to the end of its process.
            parallel_state.destroy_model_parallel()
            disconnect()
    return code, printed.getvalue()
