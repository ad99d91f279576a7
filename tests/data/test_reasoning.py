"""The reasoning demo's task: keys are right, sets have nothing in common, a seed decides all."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from phi4.cli.data import app
from phi4.config import TokenizerConfig, load_recipe
from phi4.data.demo.arithmetic import Writer, draw_expression, value, write_solution
from phi4.data.demo.reasoning import QUESTION_SETS, ReasoningData, build_reasoning
from phi4.data.files.token_file import TokenFile
from phi4.data.rows.conversations import read_conversation
from phi4.data.vocabulary.chat import encode_chat
from phi4.data.vocabulary.tokenizer import load_tokenizer
from phi4.errors import DataError
from phi4.oracles.exact import ExactOracle
from phi4.oracles.verdict import Grade, ToGrade

SMALL = ReasoningData(seed=5).scaled(0.02)
FAULTLESS = Writer(precedence_error=0.0, slip=0.0)
RECIPES = Path(__file__).parents[2] / "examples/recipes"

digits = st.sampled_from("0123456789")
expressions = st.lists(st.tuples(st.sampled_from("+*"), digits), min_size=1, max_size=7).flatmap(
    lambda rest: digits.map(lambda first: first + "".join(map("".join, rest)))
)


@given(expressions)
def test_value_is_that_of_python(expression: str) -> None:
    assert value(expression) == eval(expression) % 10


@given(expressions, st.integers(0, 1000))
def test_steps_of_a_faultless_writer_have_the_value_of_the_expression(
    expression: str, seed: int
) -> None:
    steps = write_solution(random.Random(seed), expression, FAULTLESS).split("=")
    assert {value(step) for step in steps} == {value(expression)}
    operators = [len(step) // 2 for step in (expression, *steps)]
    assert operators == list(range(len(expression) // 2, -1, -1))


@pytest.mark.parametrize(("precedence_error", "slip"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_writer_errs_as_it_is_told(precedence_error: float, slip: float) -> None:
    draw = random.Random(0)
    writer = Writer(precedence_error, slip)
    # Only a sum beside a product can come too early.
    trapped, safe = "3+5*2", "3+5+2"
    ends = {
        one: {write_solution(draw, one, writer)[-1] for _ in range(50)} for one in (trapped, safe)
    }
    if slip:
        assert len(ends[safe]) > 5
    else:
        assert ends == {trapped: {"6"}, safe: {"0"}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reasoning")
    build_reasoning(out, SMALL)
    return out


def documents(out: Path, name: str) -> list[str]:
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path=str(out / "bpe.tiktoken")))
    text = tokenizer.decode(TokenFile(out / name).tokens)
    return text.removesuffix("<|endoftext|>").split("<|endoftext|>")


def rows(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def test_no_expression_is_in_two_sets(built: Path) -> None:
    asked = {name: {row["id"] for row in rows(built, name)} for name in QUESTION_SETS}
    asked["held_out"] = {text.split("=")[0] for text in documents(built, "pretrain_held_out")}
    learned = {text.split("=")[0] for text in documents(built, "pretrain")}
    assert {name: len(found) for name, found in asked.items()} == {
        **SMALL.num_questions,
        "held_out": 500,
    }
    everything = [one for found in (*asked.values(), learned) for one in found]
    assert len(everything) == len(set(everything))
    assert len(documents(built, "pretrain")) == SMALL.num_documents


def test_the_oracle_takes_the_keys(built: Path) -> None:
    oracle = ExactOracle()
    for row in rows(built, "test"):
        solution = write_solution(random.Random(0), row["id"], FAULTLESS)
        wrong = solution[:-1] + str((int(solution[-1]) + 1) % 10)
        graded = oracle.grade([ToGrade(text, row["answer"]) for text in (solution, wrong)])
        assert [one.outcome for one in graded] == [Grade.RIGHT, Grade.WRONG]
        assert row["prompt"] == row["id"] + "="


def test_a_seed_decides_all(built: Path, tmp_path: Path) -> None:
    names = ["pretrain.bin", "pretrain_held_out.bin", *(f"{name}.jsonl" for name in QUESTION_SETS)]
    for seed in (5, 6):
        build_reasoning(tmp_path / str(seed), replace(SMALL, seed=seed))
    for name in names:
        content = (built / name).read_bytes()
        assert (tmp_path / "5" / name).read_bytes() == content
        assert (tmp_path / "6" / name).read_bytes() != content


def test_recipes_have_the_vocabulary_and_room_for_a_pair(built: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path=str(built / "bpe.tiktoken")))
    row = {"prompt": "3+5+5*2=", "completion": "8+5*2=8+0=8"}
    ids = encode_chat(read_conversation(row), tokenizer).ids
    # Two headers of three tokens and two ends of turns around 8 + 11 characters.
    assert len(ids) == 3 + 8 + 1 + 3 + 11 + 1
    shapes = set()
    for path in RECIPES.glob("reasoning_*.toml"):
        recipe = load_recipe(path)
        shapes.add(recipe.model.model_dump_json())
        assert recipe.model.vocab_size == tokenizer.vocab_size
        # Two answers of six operators, each with its prompt.
        assert recipe.data.sequence_length >= 2 * (3 + 14 + 1 + 3 + 42)
    assert len(shapes) == 1


def test_what_is_there_is_kept_or_refused(built: Path) -> None:
    before = (built / "pretrain.bin").stat().st_mtime_ns
    build_reasoning(built, SMALL)
    assert (built / "pretrain.bin").stat().st_mtime_ns == before
    with pytest.raises(
        DataError, match=r"holds data with seed=5, but 6 was requested; give another --out"
    ):
        build_reasoning(built, replace(SMALL, seed=6))


def test_too_few_expressions_are_an_error(tmp_path: Path) -> None:
    few = replace(SMALL, num_operators=1, num_questions={"test": 100})
    with pytest.raises(DataError, match=r"600 questions .* of 200 expressions with 1 operators"):
        build_reasoning(tmp_path, few)


def test_drawn_expressions_have_both_operators_everywhere() -> None:
    draw = random.Random(0)
    drawn = [draw_expression(draw, 3) for _ in range(400)]
    assert {len(one) for one in drawn} == {7}
    for place in (1, 3, 5):
        assert 0.4 < sum(one[place] == "*" for one in drawn) / 400 < 0.6


def test_command(tmp_path: Path) -> None:
    words = ["reasoning", f"--out={tmp_path}", "--seed=2", "--operators=4", "--scale=0.01"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "900 documents" in result.output and "an answer has 20 tokens" in result.output
    report = json.loads((tmp_path / "reasoning.json").read_text())
    assert (report["seed"], report["num_operators"], report["num_questions"]["sft"]) == (2, 4, 15)
