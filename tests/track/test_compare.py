"""Two runs compared: planted differences under noise that goes on from step to step."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import typer

from phi4.cli.track_compare import register
from phi4.cli.usage_errors import UsageErrorsGroup
from phi4.config import Recipe, with_overrides
from phi4.errors import DataError
from phi4.rundir.run_record import RunRecord
from phi4.track.compare import LossGap, compare_runs
from phi4.track.noise import mean_of, ratio_of_medians, student_quantile
from tests.support.recorded_runs import RecordedRun, eventful_run

NUM_SEEDS = 200
STEP_TOKENS = 1_000
RECIPE = Recipe()

ENOUGH = 0.905 * NUM_SEEDS
"""Of 200 intervals at 95%, 181 or more hold what they should with probability 0.997."""


def autoregressive(
    random: np.random.Generator, size: int, memory: float, count: int = NUM_SEEDS
) -> np.ndarray:
    """Noise of spread 1 whose next value remembers so much of the last one: [count, size]."""
    shocks = random.normal(size=(count, size)) * np.sqrt(1 - memory**2)
    values = np.empty_like(shocks)
    values[:, 0] = random.normal(size=count)
    for at in range(1, size):
        values[:, at] = memory * values[:, at - 1] + shocks[:, at]
    return values


def record(losses: Sequence[float], *overrides: str, **columns: Sequence[float]) -> RunRecord:
    steps = [
        {
            "step": number,
            "loss": float(loss),
            "consumed_tokens": number * STEP_TOKENS,
            **{key: float(values[number - 1]) for key, values in columns.items()},
        }
        for number, loss in enumerate(losses, start=1)
    ]
    return RunRecord(Path("run"), with_overrides(Recipe(), list(overrides)), steps, [], {}, [])


def falling(size: int) -> np.ndarray:
    return 3.0 + 4.0 / np.sqrt(1 + np.arange(size) / 20)


def gaps(gap: float, memory: float, size: int = 400) -> list[LossGap]:
    """The results for runs with noise of their own and of the data that both drew."""
    random = np.random.default_rng(7)
    common = 0.1 * random.normal(size=(NUM_SEEDS, size))
    of_a, of_b = (0.02 * autoregressive(random, size, memory) for _ in range(2))
    a, b = falling(size) + common + of_a, falling(size) + gap + common + of_b
    return [
        compare_runs(record(one), record(other)).losses[-1] for one, other in zip(a, b, strict=True)
    ]


def test_interval_covers_a_planted_gap_at_its_rate() -> None:
    found = gaps(0.02, memory=0.3)
    assert sum(not part.gap.excludes(0.02) for part in found) >= ENOUGH
    assert np.mean([part.gap.value for part in found]) == pytest.approx(0.02, abs=0.001)
    # It is an interval, and not a refusal to say anything: most of them show the gap.
    assert sum(part.verdict() == "B is higher" for part in found) > 0.9 * NUM_SEEDS


def test_no_gap_is_no_difference() -> None:
    verdicts = [part.verdict() for part in gaps(0.0, memory=0.3)]
    assert verdicts.count("no difference shown") >= ENOUGH


@pytest.mark.parametrize(("memory", "size"), [(0.0, 50), (0.7, 300), (0.9, 1_000), (0.97, 4_000)])
def test_interval_covers_the_mean_whatever_the_noise_remembers(memory: float, size: int) -> None:
    count = 1_000
    noise = autoregressive(np.random.default_rng(5), size, memory, count)
    found = [mean_of(0.02 + values) for values in noise]
    rate = sum(not one.excludes(0.02) for one in found) / count
    # Three standard deviations of a count of 1,000 at 95% on either side.
    assert 0.929 <= rate <= 0.971
    # Nor is it far too wide: its half is 1.96 true standard errors, and Student's more.
    true = np.sqrt((1 + memory) / (1 - memory) / size)
    assert np.median([one.high - one.value for one in found]) < 1.4 * 1.96 * true
    assert sum(one.is_sound for one in found) > 0.9 * count


def test_interval_covers_the_mean_where_little_of_the_noise_goes_on_for_long() -> None:
    random, count = np.random.default_rng(6), 1_000
    white, slow = (autoregressive(random, 1_000, memory, count) for memory in (0.0, 0.95))
    found = [mean_of(values) for values in np.sqrt(0.8) * white + np.sqrt(0.2) * slow]
    assert sum(not one.excludes(0.0) for one in found) / count >= 0.91


def test_interval_that_ignored_the_noise_going_on_would_be_wrong() -> None:
    noise = autoregressive(np.random.default_rng(9), 300, 0.9)
    naive = 1.96 * noise.std(axis=1, ddof=1) / np.sqrt(300)
    assert np.mean(np.abs(noise.mean(axis=1)) > naive) > 0.4


def test_a_large_gap_is_shown_with_its_sign() -> None:
    noise = 0.02 * autoregressive(np.random.default_rng(1), 400, 0.5)
    a = record(falling(400) + noise[0])
    verdicts = [
        compare_runs(a, record(falling(400) + gap + noise[1])).losses[-1].verdict()
        for gap in (0.1, -0.1)
    ]
    assert verdicts == ["B is higher", "B is lower"]


def test_noise_that_hardly_changes_says_too_little() -> None:
    noise = 0.02 * autoregressive(np.random.default_rng(2), 400, 0.99)
    found = compare_runs(record(falling(400) + noise[0]), record(falling(400) + noise[1]))
    assert found.losses[-1].verdict() == "too few independent steps to tell"


def test_paired_data_narrow_the_interval() -> None:
    random = np.random.default_rng(3)
    size = 800
    common, others = 0.1 * random.normal(size=(2, size))
    own = 0.01 * random.normal(size=(2, size))
    a = record(falling(size) + common + own[0])
    same, other = (
        compare_runs(a, record(falling(size) + noise + own[1], *words))
        for noise, words in ((common, ()), (others, ("run.seed=5",)))
    )
    assert (same.is_paired, other.is_paired) == (True, False)
    widths = [part.losses[-1].gap.high - part.losses[-1].gap.low for part in (same, other)]
    assert widths[1] > 5 * widths[0]


def test_runs_with_other_batches_meet_at_equal_tokens() -> None:
    # B's steps are twice as large, and its loss is the same function of tokens, plus 0.5.
    a = record([10.0 - 0.01 * n for n in range(1, 401)])
    b = record([])
    lines = [
        {"step": n, "loss": 10.5 - 0.01 * (2 * n - 0.5), "consumed_tokens": 2 * n * STEP_TOKENS}
        for n in range(1, 201)
    ]
    found = compare_runs(a, RunRecord(Path("b"), b.recipe, lines, [], {}, []))
    assert len(found.losses) == 4
    assert found.losses[-1].to_tokens == 400 * STEP_TOKENS
    assert [part.gap.value for part in found.losses] == pytest.approx([0.5] * 4, abs=1e-9)


def test_step_and_tokens_at_which_b_is_as_low() -> None:
    losses = np.linspace(5.0, 3.0, 200)
    # B falls twice as fast and goes on as long.
    found = compare_runs(record(losses), record(np.linspace(5.0, 1.0, 200))).reach
    assert found.a_tokens == 200 * STEP_TOKENS
    # B is at A's last loss after 100 steps; half a span of the means later for both.
    assert found.loss == pytest.approx(losses[-10:].mean())
    assert found.step == pytest.approx(102, abs=2)
    assert found.tokens == found.step * STEP_TOKENS
    never = compare_runs(record(losses), record(losses + 1.0)).reach
    assert (never.step, never.tokens) == (None, None)


def test_throughput_ratio_covers_the_planted_one() -> None:
    random = np.random.default_rng(4)
    slow, fast = (5 * autoregressive(random, 300, 0.5) + rate for rate in (100, 110))
    pairs = list(zip(fast, slow, strict=True))[:40]
    assert sum(not ratio_of_medians(*pair).excludes(1.1) for pair in pairs) >= 0.85 * 40


def test_first_steps_of_an_attempt_are_no_throughput() -> None:
    rates, attempts = [1.0, 1.0, 1.0, 100.0] * 8, np.repeat(range(8), 4)
    found = compare_runs(
        record([3.0] * 32, tokens_per_second=rates, attempt=attempts),
        record([3.0] * 32, tokens_per_second=[50.0] * 32),
    ).throughput
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)
    few = record([3.0] * 5, tokens_per_second=[1.0] * 5)
    assert compare_runs(few, few).throughput is None


def test_held_out_losses_meet_at_equal_tokens() -> None:
    a, b = record([3.0] * 20), record([3.0] * 20)
    for run, at, loss in ((a, 9, 2.5), (a, 19, 2.0), (b, 14, 9.0), (b, 19, 2.25)):
        run.steps[at]["held_out_loss"] = loss
    (gap,) = compare_runs(a, b).held_out
    assert (gap.name, gap.tokens, gap.a, gap.b) == ("held_out_loss", 20_000, 2.0, 2.25)


@pytest.mark.parametrize(
    ("overrides", "warning", "compared"),
    [
        (["tokenizer.kind='bpe'"], "the tokenizers differ (tokenizer.kind)", False),
        (["model.vocab_size=512"], "the tokenizers differ (model.vocab_size)", False),
        (["run.stage='dpo'"], "the stages differ (pretrain, dpo)", False),
        (["data.sources=[{name='a', path='x'}]"], "the training data differ", True),
        (["data.sequence_length=8192"], "the sequence lengths differ", True),
        (["data.held_out=[{name='h', path='x'}]"], "the held-out data differ", True),
    ],
)
def test_what_makes_losses_no_comparison_is_said(
    overrides: list[str], warning: str, compared: bool
) -> None:
    found = compare_runs(record(falling(80)), record(falling(80), *overrides))
    assert found.warnings[0].startswith(warning)
    assert bool(found.losses) == compared
    assert (found.reach is not None) == compared


def test_keys_that_differ_are_by_kind() -> None:
    a, b = record([3.0]), record([3.0], "run.dir=x", "run.seed=5", "parallel.data=2")
    found = compare_runs(a, b)
    assert found.differing["identity"] == {"run.seed": (1234, 5)}
    assert found.differing["free"] == {"parallel.data": (1, 2)}
    assert found.differing["schedule"] == {}


@pytest.mark.parametrize("freedom", [3, 5, 10, 100])
def test_student_quantile(freedom: int) -> None:
    table = {3: 3.1824, 5: 2.5706, 10: 2.2281, 100: 1.9840}
    assert student_quantile(0.975, freedom) == pytest.approx(table[freedom], rel=0.01)


def run_command(*words: str) -> None:
    app = typer.Typer(cls=UsageErrorsGroup, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    register(app)
    app(["compare", *words], standalone_mode=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    made = [
        eventful_run(root / "a"),
        eventful_run(root / "b", recipe=("optim.learning_rate=1e-4",), seed=1),
    ]
    return [str(run.write()) for run in made]


def test_command_prints_what_differs(runs: list[str], capsys: pytest.CaptureFixture) -> None:
    run_command(*runs)
    printed = capsys.readouterr().out
    assert re.search(r"schedule\s+│ optim.learning_rate\s+│ 0.0003 │ 0.0001", printed)
    assert printed.count("no difference shown") + printed.count("B is ") >= 4
    assert "restart" in printed and "Throughput: B has 1.000 times" in printed


def test_command_prints_json_and_a_page(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_command(*runs, "--json", "--html", str(tmp_path / "both.html"))
    printed = json.loads(capsys.readouterr().out)
    assert printed["differing"]["schedule"] == {"optim.learning_rate": [3e-4, 1e-4]}
    assert printed["goodput"][0]["share"] == pytest.approx(0.338, abs=0.001)
    assert {"value", "low", "high"} <= set(printed["losses"][-1]["gap"])
    assert "<html" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_run_that_is_none_is_one_error(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config.toml does not exist; give the directory of a run"):
        run_command(runs[0], str(tmp_path))


def test_run_without_a_step_compares_recipes(runs: list[str], tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "empty")
    run.start()
    run.write()
    run_command(runs[0], str(run.run_dir))
