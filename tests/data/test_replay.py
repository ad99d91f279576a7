import re
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from phi4.cli.data import app
from phi4.config import Recipe, dump_toml, parse_recipe
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.stream.batch import Batch
from phi4.data.stream.ledger import BlendEntry, Ledger, SourceCount, parse_state
from phi4.data.stream.loader import Loader
from phi4.data.stream.replay import rewind
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import load_tokenizer, rank_file_bytes
from phi4.engine.platform import Platform
from phi4.engine.step_values import StepResult
from phi4.errors import CheckpointError, ConfigError, DataError
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir
from phi4.rundir.names import LATEST_FILE, MANIFEST_FILE, RECIPE_FILE, STATE_FILE
from phi4.rundir.roll_back import commit_roll_back, continued_behind
from phi4.rundir.state import RunState, read_recipe, read_state
from phi4.train.changes import with_changes
from phi4.train.hooks import Progress
from phi4.train.ledger_record import LedgerRecord

ALONE = Platform("cpu", torch.device("cpu"), 0, 1, "test")
SIZES = {"a": SourceCount(7), "b": SourceCount(9, whole_rows=True), "c": SourceCount(50)}
WEIGHTS = st.dictionaries(st.sampled_from(sorted(SIZES)), st.sampled_from([0.2, 1.0]), min_size=1)
RUN = {"seed": 1, "unit_tokens": 4}


def loss_of(name: str, ordinals: np.ndarray) -> np.ndarray:
    return (ordinals * 7919 + len(name)) % 13 + 1


def book(weights: dict[str, float], by: str, state: dict | None) -> Ledger:
    sources = {name: SIZES[name] for name in weights}
    draw_units = 4 if "b" in weights else 1
    blend = BlendEntry(weights=weights, drawn={}, draw_units=draw_units, weigh_by=by)
    return Ledger(sources, blend, state=state, loss_of=loss_of, **RUN)


@given(
    blends=st.lists(
        st.tuples(WEIGHTS, st.sampled_from(["units", "loss_tokens"]), st.integers(0, 9)),
        min_size=1,
        max_size=4,
    ),
    back=st.integers(0, 40),
    help_at_hand=st.booleans(),
    is_recorded=st.booleans(),
)
def test_every_place_comes_back_from_the_last_ledger(
    blends: list, back: int, help_at_hand: bool, is_recorded: bool
) -> None:
    state, places = None, []
    for weights, by, length in blends:
        ledger = book(weights, by, state)
        for _ in range(length):
            # 4 units a step, so that the blends' steps are of one size.
            draws = ledger.draw(4 // ledger.draw_units)
            places.append((weights, by, ledger.state(), draws))
            ledger.count(draws)
        state = ledger.state()
    if back >= len(places):
        return
    weights, by, at, draws = places[-1 - back]
    earlier = [parse_state(place[2]) for place in places[:-1:3] if help_at_hand]
    counts = {name: (c["drawn"], c["loss_tokens"]) for name, c in at["sources"].items()}
    recorded = counts if is_recorded else None
    start, between = rewind(parse_state(state), 4 * (back + 1), earlier, recorded)
    assert not is_recorded or between == 0
    ledger = book(weights, by, msgspec.to_builtins(start))
    ledger.skip(between)
    assert (
        ledger.state()["sources"].items()
        >= {name: count for name, count in at["sources"].items() if count["drawn"]}.items()
    )
    again = ledger.draw(draws.source.size)
    assert np.array_equal(again.source, draws.source)
    assert np.array_equal(again.ordinal, draws.ordinal)


def test_a_stream_shorter_than_asked_is_refused() -> None:
    ledger = book({"a": 1.0}, "units", None)
    ledger.count(ledger.draw(5))
    with pytest.raises(DataError, match="counts fewer units than the run's steps took"):
        rewind(parse_state(ledger.state()), 6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "bpe.tiktoken"
    path.write_bytes(rank_file_bytes(train_bpe(["the cat sat on the mat\n"] * 3, 360)))
    return path


class FakeRun:
    """A run without a model: the loader, the state and the checkpoints of one."""

    def __init__(self, directory: Path, ranks: Path) -> None:
        self.directory, self.ranks = directory, ranks
        self.state, self.recipe = RunState(), Recipe()
        self.served: list[list[Batch]] = []

    def source(self, name: str, text: str, weight: float) -> dict:
        prefix = self.directory / name
        tokenizer = load_tokenizer(self._recipe({}).tokenizer)
        with TokenFileWriter(prefix, tokenizer.facts) as writer:
            for number in range(20):
                ids = [*tokenizer.encode(f"{text} {number} " * (number + 2)), tokenizer.eod_id]
                writer.add(np.array(ids))
        return {"name": name, "path": str(prefix), "weight": weight}

    def train(self, steps: int, *, save: bool = True, **tables: dict) -> None:
        recipe = self._recipe(tables)
        if self.state.step:
            self.state = with_changes(self.state, self.recipe, recipe, allow=True, say=[].append)
        self.recipe = recipe
        tokenizer = load_tokenizer(recipe.tokenizer)
        loader = Loader(recipe.data, tokenizer.facts, recipe.run.seed, self.state.data)
        size = recipe.batch.global_batch_size
        record = LedgerRecord(recipe, ALONE)
        record.start(self.state)
        for step in range(self.state.step + 1, self.state.step + steps + 1):
            batches = loader.next_step(
                global_batch_size=size, micro_batch_size=1, dp_rank=0, dp_size=1
            )
            self.served.append(batches)
            self.state = msgspec.structs.replace(self.state, step=step, data=loader.state())
            record.act(_progress(self.state))
        record.close()
        if save:
            self._save()

    def roll_back(self, step: int, reason: str) -> None:
        """To the checkpoint of a step, behind all that was served."""
        run, data = self.directory / "run", self.recipe.data
        checkpoint = checkpoints_dir(run) / checkpoint_name(step)
        saved, written = read_state(checkpoint), read_recipe(checkpoint)
        saved = with_changes(saved, written, self.recipe, allow=True, say=[].append)
        self.state = continued_behind(
            saved, self.state, row_units=data.sequence_length // data.unit_tokens, reason=reason
        )
        commit_roll_back(run, self.state)
        del self.served[step:]

    def _save(self) -> None:
        root = self.directory / "run" / "checkpoints"
        path = root / f"step_{self.state.step:07}"
        path.mkdir(parents=True)
        (path / RECIPE_FILE).write_text(dump_toml(self.recipe))
        (path / STATE_FILE).write_text(self.state.to_json())
        (path / MANIFEST_FILE).touch()
        (root / LATEST_FILE).write_text(f"{path.name}\n")

    def _recipe(self, tables: dict) -> Recipe:
        run = {"dir": str(self.directory / "run")}
        return parse_recipe(
            {"tokenizer": {"kind": "bpe", "path": str(self.ranks)}, "run": run, **tables}
        )


def _progress(state: RunState) -> Progress:
    result = Mock(spec=StepResult)
    return Progress(state, 10**6, 1, 1.0, 1.0, result)


def skipping(record: list[int]) -> Callable[[Ledger, int], None]:
    """`Ledger.skip`, which notes how far."""
    skip = Ledger.skip
    return lambda ledger, num_draws: record.append(num_draws) or skip(ledger, num_draws)


def phi4_data(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def run(tmp_path: Path, ranks: Path) -> FakeRun:
    """A blend change, a longer row, a larger batch and a retired source."""
    run = FakeRun(tmp_path, ranks)
    cat, mat = run.source("cats", "the cat", 0.3), run.source("mats", "a mat", 0.7)
    short = {"sequence_length": 8, "unit_tokens": 8}
    run.train(3, data=short | {"sources": [cat, mat]}, batch={"global_batch_size": 4})
    turned = [cat | {"weight": 0.7}, mat | {"weight": 0.3}]
    run.train(2, save=False, data=short | {"sources": turned}, batch={"global_batch_size": 6})
    long = {"sequence_length": 16, "unit_tokens": 8}
    hats = run.source("hats", "his hat", 0.6)
    sources = [mat | {"weight": 0.4}, hats]
    run.train(2, data=long | {"sources": sources}, batch={"global_batch_size": 5})
    return run


def test_trace_names_what_each_step_was_fed(run: FakeRun) -> None:
    tokenizer = load_tokenizer(run.recipe.tokenizer)
    for step, batches in enumerate(run.served, start=1):
        for sample, batch in enumerate(batches):
            printed = phi4_data(
                "trace", run.directory / "run", "--step", step, "--sample", sample, "--show"
            )
            origins, text = printed.split("---\n")
            assert text == tokenizer.decode(batch.tokens[0]) + "\n"
            # At least the unit that each 8 tokens of the row begin with.
            assert origins.count("source '") >= batch.tokens.size // 8


def test_trace_locates_the_token_in_the_file(run: FakeRun) -> None:
    printed = phi4_data("trace", run.directory / "run", "--step", 1, "--sample", 2)
    for line in printed.splitlines():
        found = re.search(r"token (\d+): .*, (\S+)\.bin, document (\d+), offset (\d+)", line)
        begin, prefix, document, offset = found.groups()
        token = TokenFile(prefix).document(int(document))[int(offset)]
        assert token == run.served[0][2].tokens[0, int(begin)]


def test_files_may_move_and_the_stream_goes_on(run: FakeRun, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    sources = [source.model_dump(exclude_none=True) for source in run.recipe.data.sources]
    for source in sources:
        for file in tmp_path.glob(f"{source['name']}.*"):
            file.rename(elsewhere / file.name)
        source["path"] = str(elsewhere / source["name"])
    data = run.recipe.data.model_dump(exclude_none=True) | {"sources": sources}
    recipe = run._recipe({"data": data, "batch": {"global_batch_size": 5}})
    assert with_changes(run.state, run.recipe, recipe, allow=False, say=[].append) == run.state
    blends = len(run.state.data["blends"])
    run.train(1, data=data, batch={"global_batch_size": 5})
    assert len(run.state.data["blends"]) == blends
    tokenizer = load_tokenizer(run.recipe.tokenizer)
    for step, sample in ((8, 2), (6, 0)):
        printed = phi4_data("trace", run.directory / "run", "--step", step, "--sample", sample)
        assert "elsewhere" in printed
    # A step of an earlier blend, before the files moved.
    shown = phi4_data("trace", run.directory / "run", "--step", 4, "--sample", 0, "--show")
    assert shown.endswith(tokenizer.decode(run.served[3][0].tokens[0]) + "\n")


@pytest.mark.parametrize("record", ["whole", "cut off", "lost"])
def test_steps_of_a_blend_by_loss_tokens_are_found_again(
    tmp_path: Path, ranks: Path, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(tmp_path, ranks)
    cat, mat = run.source("cats", "the cat", 0.25), run.source("mats", "a mat", 0.75)
    data = {"sequence_length": 16, "unit_tokens": 8, "weigh_by": "loss_tokens"}
    sources = [cat | {"kind": "windows"}, mat]
    for _ in range(3):
        run.train(2, data=data | {"sources": sources}, batch={"global_batch_size": 4})
    tokenizer = load_tokenizer(run.recipe.tokenizer)
    kept = tmp_path / "run" / "ledger.jsonl"
    if record != "whole":
        kept.write_bytes(kept.read_bytes()[:-9] if record == "cut off" else b"")
    skipped: list[int] = []
    monkeypatch.setattr(Ledger, "skip", skipping(skipped))
    for step, batches in enumerate(run.served, start=1):
        printed = phi4_data("trace", run.directory / "run", "--step", step, "--sample", 3, "--show")
        assert printed.split("---\n")[1] == tokenizer.decode(batches[3].tokens[0]) + "\n"
    # With the record no draw is made twice; without it those since the checkpoint before are.
    assert skipped == ([0, 4, 0, 4, 0, 4] if record == "lost" else [0] * 6)
    loss = sum(int(batch.loss_mask.sum()) for batches in run.served for batch in batches)
    shown = phi4_data("ledger", run.directory / "run")
    assert f"blend 1: {loss:,} loss tokens drawn" in shown
    cats = run.state.data["sources"]["cats"]["loss_tokens"]
    assert re.search(rf"cats +25\.0000% +{100 * cats / loss:.4f}% +{cats} loss tokens", shown)


def test_ledger_shows_asked_drawn_and_epochs(run: FakeRun) -> None:
    printed = phi4_data("ledger", run.directory / "run")
    assert re.search(r"blend 1: 12 units drawn", printed)
    assert re.search(r"blend 3: 20 units drawn", printed)
    assert re.search(r"hats +60\.0000% +60\.0000% +12 units", printed)
    total = run.state.data["sources"]["mats"]
    epochs = total["drawn"] / total["num_units"]
    assert re.search(rf"mats +{total['drawn']} +{total['num_units']} +{epochs:.3f}", printed)


@pytest.mark.parametrize("weigh_by", ["units", "loss_tokens"])
def test_steps_around_roll_backs_are_found_again(
    tmp_path: Path, ranks: Path, weigh_by: str
) -> None:
    """Two of them, the second one over a change of the batch and over the first one's end."""
    run = FakeRun(tmp_path, ranks)
    sources = [run.source("cats", "the cat", 0.3), run.source("mats", "a mat", 0.7)]
    data = {"sequence_length": 16, "unit_tokens": 8, "weigh_by": weigh_by, "sources": sources}
    run.train(2, data=data, batch={"global_batch_size": 4})
    run.train(3, data=data, batch={"global_batch_size": 4})
    run.roll_back(2, "spike")
    run.train(1, data=data, batch={"global_batch_size": 4})
    run.train(2, data=data, batch={"global_batch_size": 6})
    run.roll_back(3, "NaN")
    run.roll_back(3, "nothing was done since")
    run.train(2, data=data, batch={"global_batch_size": 6})
    tokenizer = load_tokenizer(run.recipe.tokenizer)
    assert len(run.served) == run.state.step == 5
    for step, batches in enumerate(run.served, start=1):
        printed = phi4_data("trace", run.directory / "run", "--step", step, "--sample", 1, "--show")
        assert printed.split("---\n")[1] == tokenizer.decode(batches[1].tokens[0]) + "\n", step
    shown = phi4_data("ledger", run.directory / "run")
    assert "before this run" not in shown
    assert "skipped 24 units (12 rows) after step 2: steps 3 to 5 were rolled back (spike)" in shown
    assert "skipped 24 units (12 rows) after step 3: steps 4 to 5 were rolled back (NaN)" in shown
    straight = Loader(run.recipe.data, tokenizer.facts, run.recipe.run.seed)
    stream = straight.next_step(global_batch_size=48, micro_batch_size=1, dp_rank=0, dp_size=1)
    expected = [*stream[:8], *stream[20:24], *stream[36:]]
    rows = [row for batches in run.served for row in batches]
    for row, of_stream in zip(rows, expected, strict=True):
        assert np.array_equal(row.tokens, of_stream.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", 8, "--sample", 0), "--step=8 is after the run's newest checkpoint, of step 7"),
        (("--step", 7, "--sample", 5), "--sample=5, but step 7 has 5 rows, from 0"),
    ],
)
def test_what_the_run_never_served_is_refused(run: FakeRun, arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        phi4_data("trace", run.directory / "run", *arguments)


def test_a_directory_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        phi4_data("ledger", tmp_path)


def test_a_step_of_a_10t_run_is_found_in_less_than_a_second() -> None:
    """From the last ledger alone, 400,000 steps of 5,760 units back."""
    weights = {"web": 0.15, "rewrites": 0.15, "synthetic": 0.4, "code": 0.2, "acquired": 0.1}
    sources = {name: SourceCount(10**9) for name in weights}
    ledger = Ledger(sources, BlendEntry(weights=weights, drawn={}), **RUN)
    ledger.skip(415_378 * 5760)
    begun = time.process_time()
    start, between = rewind(parse_state(ledger.state()), 400_000 * 5760)
    replayed = Ledger(sources, BlendEntry(weights=weights, drawn={}), state=None, **RUN)
    replayed.skip(between)
    assert time.process_time() - begun < 1
    assert sum(count.drawn for count in start.sources.values()) == 0
    assert between == 15_378 * 5760
    assert replayed.draw(20).source.size == 20
