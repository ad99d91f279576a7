"""Hugging Face directory to checkpoint and back, through the command line."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi4.cli import main
from phi4.config import dump_toml, parse_recipe
from phi4.convert import read_hf, write_hf
from phi4.data.vocabulary.tokenizer import rank_file_bytes
from phi4.engine.checkpoint import save_checkpoint
from phi4.engine.layout import destroy_layout
from tests.support.engines import engine_on
from tests.support.ranks import RankPool, pool_fixture

HF_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


pool = pool_fixture(4)


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "bpe.tiktoken"
    path.write_bytes(rank_file_bytes(tokenizer.mergeable_ranks))
    return path


@pytest.fixture(scope="module")
def phi4() -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs a command in another process; gives exit code and output."""
    with RankPool(1) as ranks:
        yield lambda *arguments: ranks.run(command, tuple(map(str, arguments)))[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, weights, model, tokenizer) -> Path:
    out = tmp_path_factory.mktemp("hf") / "model"
    write_hf(out, weights.items(), model, tokenizer, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def imported(exported, phi4, ranks_file, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    code, text = phi4("convert", "from-hf", exported, root, f"tokenizer.path={ranks_file}")
    assert (code, text) == (0, f"wrote {root}/step_0000000 from {exported}\n")
    return root


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("part", ["step_0000000", ".", ".."])
def test_round_trip_gives_the_same_bytes(exported, imported, phi4, tmp_path, part):
    """CHECKPOINT may be the checkpoint, the directory of checkpoints or the run."""
    out = tmp_path / "out"
    code, text = phi4("convert", "to-hf", imported / part, out)

    assert code == 0, text
    assert contents(out).keys() == HF_FILES
    assert contents(out) == contents(exported)


def test_round_trip_keeps_bf16(phi4, weights, model, tokenizer, ranks_file, tmp_path):
    source, stored, out = tmp_path / "hf", tmp_path / "in", tmp_path / "out"
    write_hf(source, weights.items(), model, tokenizer, dtype="bf16")

    assert phi4("convert", "from-hf", source, stored, f"tokenizer.path={ranks_file}")[0] == 0
    assert phi4("convert", "to-hf", stored, out)[0] == 0
    assert contents(out) == contents(source)


def test_dtype_of_an_export_is_the_one_asked_for(exported, imported, phi4, tmp_path):
    code, text = phi4("convert", "to-hf", imported, tmp_path / "out", "--dtype=bf16")
    assert code == 0, text

    before, after = dict(read_hf(exported)[1]()), dict(read_hf(tmp_path / "out")[1]())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)


def test_half_precision_files_lose_nothing(phi4, weights, model, tokenizer, ranks_file, tmp_path):
    write_hf(tmp_path / "hf", weights.items(), model, tokenizer, dtype="fp32")
    shard = tmp_path / "hf" / "model-00001-of-00001.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(shard).items()}
    save_file(half, shard, metadata={"format": "pt"})
    name = f"tokenizer.path={ranks_file}"

    assert phi4("convert", "from-hf", tmp_path / "hf", tmp_path / "in", name)[0] == 0
    assert phi4("convert", "to-hf", tmp_path / "in", tmp_path / "out")[0] == 0
    found = load_file(tmp_path / "out" / shard.name)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in half.items())


def test_split_model_exports_the_bytes_of_one_process(pool, phi4, model, ranks_file, tmp_path):
    model_of_four_layers = model.model_dump() | {"num_layers": 4}
    pool.run(save_layouts, model_of_four_layers, ranks_file, tmp_path)
    exports = []
    for name in LAYOUTS:
        code, text = phi4("convert", "to-hf", tmp_path / name, tmp_path / f"{name}_hf")
        assert code == 0, text
        exports.append(contents(tmp_path / f"{name}_hf"))

    assert all(export == exports[0] for export in exports)


def test_wrong_input_is_one_line_and_writes_nothing(exported, imported, phi4, tmp_path):
    source, out = exported, tmp_path / "out"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (damaged / name).write_bytes((source / name).read_bytes())
    cases = {
        ("to-hf", tmp_path, out): "no checkpoint in",
        ("to-hf", tmp_path / "absent", out): "no checkpoint in",
        ("to-hf", imported, source): "exists and is not empty; give a new directory",
        ("to-hf", imported, out, "tokenizer.path=absent"): "tokenizer ranks absent cannot be read",
        ("to-hf", imported, out, "model.num_layers=2"): "model.num_layers are fixed by",
        ("to-hf", imported, out, "parallel.tensor=2"): "1 processes were started; tensor=2",
        ("from-hf", tmp_path / "absent", out): "config.json cannot be read",
        ("from-hf", damaged, out): "is missing, but the index names it",
        ("from-hf", source, imported): "exists and is not empty; give a new directory",
        ("from-hf", source, out, "model.rope_theta=1e4"): "overrides change [model]",
        ("from-hf", source, out, "data.sequence_length=999"): "data.sequence_length=999 exceeds",
    }
    before = contents(source), sorted(imported.rglob("*"))

    for arguments, message in cases.items():
        code, text = phi4("convert", *arguments)
        assert code == 2, (arguments, text)
        assert message in text
        assert not out.exists()
    assert (contents(source), sorted(imported.rglob("*"))) == before


def test_non_finite_weights_are_not_imported(phi4, weights, model, tokenizer, ranks_file, tmp_path):
    write_hf(tmp_path / "hf", weights.items(), model, tokenizer, dtype="fp32")
    shard = tmp_path / "hf" / "model-00001-of-00001.safetensors"
    damaged = load_file(shard)
    damaged["model.norm.weight"][3:5] = torch.nan
    save_file(damaged, shard, metadata={"format": "pt"})
    arguments = ("from-hf", tmp_path / "hf", tmp_path / "in", f"tokenizer.path={ranks_file}")
    code, text = phi4("convert", *arguments)

    assert code == 2
    assert text.count("\n") == 1
    assert "model.norm.weight has non-finite values: 2 of 48" in text
    assert not (tmp_path / "in").exists()


def test_damaged_checkpoint_is_refused(exported, phi4, ranks_file, tmp_path):
    phi4("convert", "from-hf", exported, tmp_path / "in", f"tokenizer.path={ranks_file}")
    shard = next((tmp_path / "in" / "step_0000000").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, text = phi4("convert", "to-hf", tmp_path / "in", tmp_path / "out")

    assert code == 2
    assert f"{shard} has another sha256" in text
    assert not (tmp_path / "out").exists()


# What follows runs in the ranks.

LAYOUTS = {
    "one": {},
    "split": {"tensor": 2, "pipeline": 2, "sequence": True},
    "uneven": {"tensor": 2, "pipeline": 2, "layers_per_stage": [3, 1]},
}


def command(rank: int, world_size: int, arguments: tuple[str, ...]) -> tuple[int, str]:
    """`phi4 ARGUMENTS` in rank 0: exit code, stdout and stderr together."""
    code, output = 0, io.StringIO()
    if rank == 0:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                # A command that fails ends its process and leaves this to the end.
                destroy_layout()
    return code, output.getvalue()


def save_layouts(rank: int, world_size: int, model: dict, ranks_file: Path, work_dir: Path) -> None:
    """The model of one seed, saved with its optimizer by every layout."""
    sections = {
        "model": model,
        "tokenizer": {"kind": "bpe", "path": str(ranks_file)},
        "data": {"sequence_length": 64, "unit_tokens": 64},
    }
    for name, parallel in LAYOUTS.items():
        recipe = parse_recipe(sections | {"parallel": parallel})
        files = {"recipe.toml": dump_toml(recipe)}
        with engine_on(rank, recipe) as engine:
            if engine is not None:
                save_checkpoint(
                    engine, work_dir / name, 7, form="full", keep=1, files=files, data={}
                )
