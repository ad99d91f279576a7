"""A Hugging Face directory opened in a layout: shards, from one whole tensor at a time."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from phi4.convert import read_hf, write_hf
from phi4.convert.model_source import find_model
from phi4.engine.engine import Engine
from phi4.errors import CheckpointError, ConfigError, LayoutError
from tests.support.engines import engine_on
from tests.support.ranks import pool_fixture

LAYOUT = (
    *("parallel.tensor=2", "parallel.pipeline=2", "parallel.layers_per_stage=[2,1]"),
    "data.sequence_length=64",
)


pool = pool_fixture(4)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory, weights, model, tokenizer) -> Path:
    out = tmp_path_factory.mktemp("source") / "hf"
    write_hf(out, weights.items(), model, tokenizer, dtype="fp32")
    return out


def test_ranks_hold_their_weights_and_only_a_few_whole_tensors(pool, hf_dir, tokenizer) -> None:
    outcomes = pool.run(open_split, hf_dir)
    found = {name: tensor for whole, _ in outcomes for name, tensor in whole.items()}
    expected = dict(read_hf(hf_dir).stream())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The one that is copied, and the one that is read next.
    assert max(most for _, most in outcomes) <= 2 < len(expected)
    assert find_model(hf_dir).tokenizer().fingerprint == tokenizer.fingerprint


def test_missing_weights_are_named(pool, hf_dir) -> None:
    message = pool.run(open_without, hf_dir, "output_layer.weight")[0]
    assert message == "no weights for output_layer.weight"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("model.num_layers=2",), ConfigError, "overrides change [model]"),
        (("parallel.tensor=4",), LayoutError, "parallel.tensor=4 does not divide"),
        (("parallel.data=0",), LayoutError, "parallel.data=0, but generation uses one replica"),
        (
            ("parallel.context=2",),
            LayoutError,
            "parallel.context=2, but generation uses one replica",
        ),
        (("parallel.tensr=2",), ConfigError, "did you mean parallel.tensor?"),
    ],
)
def test_overrides_lay_out_one_replica_of_the_same_model(hf_dir, overrides, error, message) -> None:
    with pytest.raises(error) as caught:
        find_model(hf_dir, overrides)
    assert message in str(caught.value)


def test_place_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        find_model(tmp_path)


# What follows runs in the ranks.


def open_split(rank: int, world_size: int, hf_dir: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Whole parameters of this rank's stage, and the most whole tensors that lived at once."""
    source, lives, most = find_model(hf_dir, LAYOUT), [], 0

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, tensor in source.hugging_face.stream():
            lives.append(weakref.ref(tensor))
            most = max(most, sum(life() is not None for life in lives))
            yield name, tensor

    with engine_on(rank, source.recipe, trains=False) as engine:
        engine.read_parameters(watched())
        return dict(engine.whole_parameters()), most


def open_without(rank: int, world_size: int, hf_dir: Path, missing: str) -> str | None:
    source = find_model(hf_dir)
    with engine_on(rank, source.recipe, trains=False) as engine:
        if engine is None:
            return None
        return _refusal(engine, source.hugging_face.stream(), missing)


def _refusal(engine: Engine, stream: Iterator[tuple[str, torch.Tensor]], missing: str) -> str:
    with pytest.raises(KeyError) as caught:
        engine.read_parameters((name, tensor) for name, tensor in stream if name != missing)
    return caught.value.args[0]
