"""Midtraining that goes on with the ledger of pretraining: real runs, units read off the batches.

Every id occurs once in the sources, so what a row holds says which units it is made of.
"""

import re
from contextlib import chdir
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from phi4.cli.data import app
from phi4.config import TokenizerConfig
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.stream import window_table
from phi4.data.stream.batch import Batch
from phi4.data.stream.read_ahead import ReadAheadLoader
from phi4.data.vocabulary.tokenizer import load_tokenizer, rank_file_bytes
from phi4.engine.platform import Platform, connect, disconnect
from phi4.errors import Phi4Error
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir, find_checkpoint
from phi4.rundir.manifest import manifest_hash
from phi4.rundir.state import RunState, read_state
from phi4.stages.pretrain import NextToken
from phi4.train.session import run_training
from phi4.train.sources import check_tokenizer, open_sources
from tests.support.engines import platform_of, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture, rendezvous

WEB_UNITS, CODE_UNITS = 50, 23
FIRST_ID = {"web": 0, "code": 8 * WEB_UNITS, "long": 8 * (WEB_UNITS + CODE_UNITS)}
LONG_DOCUMENTS = [40, 25, 9, 33, 70, 12, 28]
MODEL = (
    *("tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken", "model.vocab_size=1024"),
    *("model.num_layers=2", "data.unit_tokens=8", "batch.micro_batch_size=4"),
)
WEB, CODE = "name='web', path='web'", "name='code', path='code'"
PRETRAIN = (
    *("run.dir=pretrain", "data.sequence_length=8", "checkpoint.every=2"),
    f"data.sources=[{{{WEB}, weight=0.6}}, {{{CODE}, weight=0.4}}]",
)
MIDTRAIN = (
    *("run.dir=midtrain", "data.sequence_length=32"),
    *("run.init_from=pretrain", "data.continue_from=pretrain"),
    f"data.sources=[{{{WEB}, weight=0.5}}, {{{CODE}, weight=0.2}}, "
    "{name='long', path='long', weight=0.3, kind='windows'}]",
)


class Recorded(ReadAheadLoader):
    """A loader that keeps what it served."""

    served: list[tuple[int, list[Batch]]]

    def next_step(self, **layout: int) -> list[Batch]:
        batches = super().next_step(**layout)
        self.served.append((layout["dp_rank"], batches))
        return batches


def _train(rank: int, world_size: int, root: Path, overrides: tuple[str, ...]) -> tuple[list, int]:
    """Data rank and rows, [n, S], of each step; tables of rows that this rank computed."""
    recipe = tiny_recipe(*MODEL, *overrides)
    platform = platform_of(rank, recipe)
    if platform is None:
        return [], 0
    Recorded.served = []
    computing = patch("phi4.data.stream.window_table._computed", wraps=window_table._computed)
    recording = patch("phi4.train.sources.ReadAheadLoader", Recorded)
    with chdir(root), recording, computing as computed:
        run_training(recipe, platform, NextToken(), allow_change=True)
    disconnect()
    served = [(dp, np.concatenate([b.tokens for b in batches])) for dp, batches in Recorded.served]
    return served, computed.call_count


def _rows(ranks: list[tuple[list, int]], num_steps: int) -> list[np.ndarray]:
    """The global batch of each step, [rows, S], from what every rank was served."""
    steps = []
    for index in range(num_steps):
        slices = dict(served[index] for served, _ in ranks if served)
        steps.append(np.concatenate([slices[dp] for dp in sorted(slices)]))
    return steps


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and three sources in which no id occurs twice, ends of documents aside."""
    root = tmp_path_factory.mktemp("handover")
    pairs = list(product(range(32, 64), range(64, 90)))[: 1024 - 96 - 256]
    ranks = [bytes([i]) for i in range(256)] + [bytes(pair) for pair in pairs]
    (root / "bpe.tiktoken").write_bytes(rank_file_bytes({t: i for i, t in enumerate(ranks)}))
    config = TokenizerConfig(kind="bpe", path=str(root / "bpe.tiktoken"))
    facts = load_tokenizer(config).facts
    documents = {"web": [8 * WEB_UNITS + 1], "code": [8 * CODE_UNITS + 1], "long": LONG_DOCUMENTS}
    for name, lengths in documents.items():
        next_id = FIRST_ID[name]
        with TokenFileWriter(root / name, facts) as writer:
            for length in lengths:
                writer.add(np.append(np.arange(next_id, next_id + length - 1), facts.eod_id))
                next_id += length - 1
    return root


@pytest.fixture(scope="module")
def served(pool: RankPool, root: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Global batches of pretraining up to the hand-over, and of midtraining.

    Midtraining stops once and goes on in another layout, after pretraining went on as well.
    """
    before = pool.run(_train, root, (*PRETRAIN, "run.steps=3"))
    first = pool.run(_train, root, (*MIDTRAIN, "run.steps=2", "parallel.data=2"))
    assert [tables for _, tables in first] == [1, 0]
    pool.run(_train, root, (*PRETRAIN, "run.steps=4"))
    then = pool.run(_train, root, (*MIDTRAIN, "run.steps=6", "parallel.tensor=2"))
    return _rows(before, 3), _rows(first, 2) + _rows(then, 4)


def _units(rows: np.ndarray, name: str, num_units: int) -> list[int]:
    """Units of a source in rows, in the order of the stream."""
    first = rows.reshape(-1, 8)[:, 0]
    mine = first[(first >= FIRST_ID[name]) & (first < FIRST_ID[name] + 8 * num_units)]
    units, begins = np.divmod(mine - FIRST_ID[name], 8)
    assert not begins.any()
    return units.tolist()


@pytest.mark.parametrize(("name", "num_units"), [("web", WEB_UNITS), ("code", CODE_UNITS)])
def test_recall_repeats_no_unit_and_loses_none(served, name: str, num_units: int) -> None:
    before, after = (
        [unit for rows in run for unit in _units(rows, name, num_units)] for run in served
    )
    units = before + after
    # The hand-over is inside an epoch, and there are several.
    assert len(before) % num_units and len(units) > 2 * num_units - 10
    for begin in range(0, len(units), num_units):
        epoch = units[begin : begin + num_units]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) == num_units or begin + num_units > len(units)


def test_new_blend_holds_its_quota_from_the_hand_over_on(served) -> None:
    rows = np.concatenate(served[1])
    is_long = rows.max(axis=1, where=rows < 900, initial=0) >= FIRST_ID["long"]
    drawn = {"long": is_long}
    drawn["web"] = ~is_long & (rows[:, 0] < FIRST_ID["code"])
    drawn["code"] = ~is_long & ~drawn["web"]
    count = np.arange(1, len(rows) + 1)
    for name, share in (("web", 0.5), ("code", 0.2), ("long", 0.3)):
        assert np.abs(np.cumsum(drawn[name]) - share * count).max() < 1


def test_new_source_starts_at_zero(served) -> None:
    rows = np.concatenate(served[1])
    long_rows = [tuple(row) for row in rows.tolist() if FIRST_ID["long"] <= row[0] < 900]
    documents = sum(length - 1 for length in LONG_DOCUMENTS)
    num_rows = len(set(long_rows))
    assert len(long_rows) >= num_rows and num_rows >= documents / 32
    assert len(set(long_rows[:num_rows])) == num_rows
    ids = {
        token for row in long_rows[:num_rows] for token in row if FIRST_ID["long"] <= token < 900
    }
    assert len(ids) == documents


def _phi4_data(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_trace_finds_the_tokens_of_steps_on_both_sides_of_a_resumption(served, root: Path) -> None:
    with chdir(root):
        for step, rows in enumerate(served[1], start=1):
            printed = _phi4_data("trace", "midtrain", "--step", step, "--sample", 5)
            for line in printed.splitlines():
                found = re.search(
                    r"token (\d+): .*, (\S+)\.bin, document (\d+), offset (\d+)", line
                )
                begin, prefix, document, offset = found.groups()
                token = TokenFile(prefix).document(int(document))[int(offset)]
                assert token in rows[5] and (begin != "0" or token in rows[5, ::8])


def test_ledger_tells_the_two_runs_apart(served, root: Path) -> None:
    with chdir(root):
        printed = _phi4_data("ledger", "midtrain")
    blends, totals = printed.split("\nstep 6\n")
    assert "blend 1: 24 units drawn" in blends
    assert "24 units of it before this run, counted by pretrain/checkpoints/step_0000003" in blends
    assert blends.count("before this run") == 1 and "blend 2: 192 units drawn" in blends
    for name, num_units in (("web", WEB_UNITS), ("code", CODE_UNITS)):
        drawn = sum(len(_units(rows, name, num_units)) for run in served for rows in run)
        assert re.search(rf"{name} +{drawn} +{num_units} +{drawn / num_units:.3f}", totals)


def test_every_checkpoint_says_which_weights_the_run_began_with(served, root: Path) -> None:
    # Pretraining has gone on since.
    start = checkpoints_dir(root / "pretrain") / checkpoint_name(3)
    for name, expected in (
        ("pretrain", ("", "")),
        ("midtrain", (f"pretrain/checkpoints/{start.name}", manifest_hash(start))),
    ):
        state = read_state(find_checkpoint(root / name))
        assert (state.weights_from, state.weights_manifest_sha256) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=1", r"run\.seed=1, but the checkpoint's stream was drawn with 1234"),
        ("data.unit_tokens=16", r"data\.unit_tokens=16, .* drawn with 8"),
        ("data.continue_from=nowhere", "no checkpoint in nowhere"),
        (
            "data.sources=[{name='web', path='code'}]",
            "source 'web' is 23 units of .* but the checkpoint has 50",
        ),
    ],
)
def test_ledger_of_another_stream_is_refused_before_the_run_exists(
    served, root: Path, override: str, message: str
) -> None:
    recipe = tiny_recipe(*MODEL, *MIDTRAIN, "run.dir=refused", override)
    alone = Platform("cpu", torch.device("cpu"), 0, 1, "no process group is needed to refuse")
    with chdir(root), pytest.raises(Phi4Error, match=message) as caught:
        run_training(recipe, alone, NextToken(), allow_change=True)
    assert "\n" not in str(caught.value) and not (root / "refused").exists()


def _open_what_is_missing(rank: int, world_size: int, root: Path) -> str:
    recipe = tiny_recipe(*MODEL, "data.sources=[{name='web', path='nowhere'}]")
    platform = connect("cpu", rank=rank, world_size=world_size, rendezvous=rendezvous())
    watching = patch("phi4.train.sources.ReadAheadLoader", wraps=ReadAheadLoader)
    with chdir(root), watching as opened:
        with pytest.raises(Phi4Error) as caught:
            open_sources(recipe, check_tokenizer(recipe), RunState(), platform)
        return f"{opened.call_count} {caught.value}"


def test_what_the_writer_finds_wrong_every_rank_raises(pool: RankPool, root: Path) -> None:
    writer, other = pool.run(_open_what_is_missing, root)
    assert "nowhere.idx cannot be read" in writer
    assert (writer[0], other[0]) == ("1", "0") and writer[1:] == other[1:]
