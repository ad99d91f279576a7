"""No command executes anything that a checkpoint holds, whoever signed its manifest."""

import contextlib
import io
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from megatron.core import parallel_state

from phi4.cli import main
from phi4.config import TokenizerConfig, dump_toml
from phi4.data.token_writer import TokenFileWriter
from phi4.data.tokenizer import load_tokenizer, rank_file_bytes
from phi4.engine.platform import disconnect
from tests.support.engines import tiny_recipe
from tests.support.hostile import poison
from tests.support.ranks import RankPool

COMMANDS = {
    "resume": ["train", "recipe.toml"],
    "init_from": ["train", "recipe.toml", "run.dir=new", "run.init_from=run"],
    "continue_from": [
        *("train", "recipe.toml", "run.dir=new", "run.init_from=run", "data.continue_from=run"),
    ],
    "generate": ["generate", "run", "--prompt=a", "--max-tokens=2"],
    "to_hf": ["convert", "to-hf", "run", "exported"],
}
FORMATS = {"full": (), "dp": ("parallel.distributed_optimizer=true",)}
REFUSALS = {
    "dotted": ".metadata has opcode POP",
    "byte_records": "something else than tensors, numbers and text",
    "tensor_as_bytes": "describes 'embedding.word_embeddings.weight' as bytes",
}


def _phi4(rank: int, world_size: int, root: Path, argv: list[str]) -> tuple[int, str]:
    """Exit code and everything printed of a command run in this process."""
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


@pytest.fixture(scope="module")
def pool():
    with RankPool(1) as ranks:
        yield ranks


@pytest.fixture(scope="module", params=FORMATS)
def run(request, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe, its data and a run with one checkpoint of each format."""
    root = tmp_path_factory.mktemp(request.param)
    ranks = {bytes([i]): i for i in range(256)}
    (root / "bpe.tiktoken").write_bytes(rank_file_bytes(ranks))
    facts = load_tokenizer(TokenizerConfig(kind="bpe", path=str(root / "bpe.tiktoken"))).facts
    with TokenFileWriter(root / "tokens", facts) as writer:
        writer.add(np.append(np.arange(1999) % 250, facts.eod_id).astype(np.int32))
    recipe = tiny_recipe(
        *("run.dir=run", "run.steps=1", "tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken"),
        *("model.vocab_size=512", "model.num_layers=2", "data.sources=[{name='a',path='tokens'}]"),
        f"checkpoint.optimizer_format={request.param}",
        *FORMATS[request.param],
    )
    (root / "recipe.toml").write_text(dump_toml(recipe))
    code, printed = pool.run(_phi4, root, ["train", "recipe.toml"])[0]
    assert code == 0, printed
    return root


@pytest.mark.parametrize("attack", REFUSALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_executed(
    command: str, attack: str, run: Path, pool: RankPool, tmp_path: Path
) -> None:
    root, marker = tmp_path / "copy", tmp_path / "executed"
    shutil.copytree(run, root)
    poison(root / "run/checkpoints/step_0000001", attack, marker)
    code, printed = pool.run(_phi4, root, COMMANDS[command])[0]
    assert not marker.exists()
    if code:
        last = printed.strip().splitlines()[-1]
        assert code == 2 and last.startswith("CheckpointError: "), printed
        assert "Traceback" not in printed and REFUSALS[attack] in last
    else:
        # Byte records belong to the optimizer; what reads weights only does not open them.
        assert attack == "byte_records", printed
