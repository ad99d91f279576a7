"""No command executes anything that a checkpoint holds, whoever signed its manifest."""

import shutil
from pathlib import Path

import pytest

from tests.support.hostile import poison
from tests.support.in_process import phi4, write_recipe
from tests.support.ranks import RankPool, pool_fixture

COMMANDS = {
    "resume": ["train", "recipe.toml"],
    "init_from": ["train", "recipe.toml", "run.dir=new", "run.init_from=run"],
    "continue_from": [
        *("train", "recipe.toml", "run.dir=new", "run.init_from=run", "data.continue_from=run"),
    ],
    "generate": ["generate", "run", "a", "--max-tokens=2"],
    "to_hf": ["convert", "to-hf", "run", "exported"],
}
FORMATS = {"full": (), "dp": ("parallel.distributed_optimizer=true",)}
REFUSALS = {
    "dotted": ".metadata has opcode POP",
    "byte_records": "something other than tensors, numbers and text",
    "tensor_as_bytes": "describes 'embedding.word_embeddings.weight' as bytes",
}


pool = pool_fixture(1)


@pytest.fixture(scope="module", params=FORMATS)
def run(request, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe, its data and a run with one checkpoint of each format."""
    root = tmp_path_factory.mktemp(request.param)
    form = f"checkpoint.optimizer_format={request.param}"
    write_recipe(root, form, *FORMATS[request.param])
    code, printed = pool.run(phi4, root, ["train", "recipe.toml"])[0]
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
    code, printed = pool.run(phi4, root, COMMANDS[command])[0]
    assert not marker.exists()
    if code:
        last = printed.strip().splitlines()[-1]
        assert code == 2 and last.startswith("CheckpointError: "), printed
        assert "Traceback" not in printed and REFUSALS[attack] in last
    else:
        # Byte records belong to the optimizer; what reads weights only does not open them.
        assert attack == "byte_records", printed
