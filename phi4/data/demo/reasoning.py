"""The reasoning demo's data: pretraining documents, and questions for every later stage.

Expressions are assigned to sets before anything is written, so no expression is in two sets, and no
question appears in pretraining.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import msgspec

from phi4.config import TokenizerConfig
from phi4.data.demo.arithmetic import SEPARATOR, Writer, draw_expression, value, write_solution
from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.token_writer import write_documents
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import NUM_ADDED_TOKENS, load_tokenizer, rank_file_bytes
from phi4.errors import DataError

QUESTION_SETS: Mapping[str, int] = {
    "sft": 1500,
    "search": 400,
    "judge": 1000,
    "stop": 400,
    "test": 400,
}
"""Number of questions of each file: for best-of answers, pivotal token search, the judge's round,
checkpoint selection, and the final evaluation."""
HELD_OUT_DOCUMENTS = 500
REPORT_FILE = "reasoning.json"
_ROLES = ("user", "assistant")
"""One token each, as in phi-4's vocabulary, so that a turn header is three tokens."""
VOCAB_SIZE = 256 + sum(len(role) - 1 for role in _ROLES) + NUM_ADDED_TOKENS
_MOST_DRAWS = 100


@dataclass(frozen=True)
class ReasoningData:
    """Size and parameters of the data.

    Attributes:
        num_operators: operators of every expression.
        num_documents: pretraining documents; an expression may be in several of them.
        num_questions: number of questions by name of the set.
        writer: writer of the documents.
        seed: seed of expressions and documents.
    """

    num_operators: int = 3
    num_documents: int = 90_000
    num_questions: Mapping[str, int] = field(default_factory=lambda: dict(QUESTION_SETS))
    writer: Writer = field(default_factory=Writer)
    seed: int = 0

    def scaled(self, scale: float) -> "ReasoningData":
        """Return a copy with the number of documents and questions multiplied, at least two of
        each."""
        num_questions = {k: max(2, round(v * scale)) for k, v in self.num_questions.items()}
        num_documents = max(2, round(self.num_documents * scale))
        return replace(self, num_documents=num_documents, num_questions=num_questions)


class ReasoningReport(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `build_reasoning`; stored as reasoning.json."""

    seed: int
    num_operators: int
    writer: Writer
    num_documents: int
    num_tokens: int
    num_questions: dict[str, int]
    answer_tokens: int
    """Length of an answer, with the token that ends it."""
    vocab_size: int
    tokenizer_fingerprint: str


def build_reasoning(out: str | Path, data: ReasoningData) -> ReasoningReport:
    """Write tokenizer, token files and question files into a directory.

    `bpe.tiktoken`; `pretrain` and `pretrain_held_out`, token files of documents such as
    `3+5+5*2=8+5*2=8+0=8`; `NAME.jsonl` of each set of questions, with the `prompt` `3+5+5*2=` and
    as `answer` the key of the oracle `exact`.

    Existing data with the same parameters is kept.

    Raises:
        DataError: there are too few expressions with this many operators, or the directory has data
            with other parameters.
    """
    out = Path(out)
    finished = _finished(out / REPORT_FILE, data)
    if finished is not None:
        return finished
    out.mkdir(parents=True, exist_ok=True)
    rank_file = out / "bpe.tiktoken"
    write_atomically(rank_file, rank_file_bytes(train_bpe(_ROLES, VOCAB_SIZE)))
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path=str(rank_file)))
    draw = random.Random(data.seed)
    sets = _deal(draw, data)
    for name in data.num_questions:
        rows = (msgspec.json.encode(question_row(one)) + b"\n" for one in sets[name])
        write_atomically(out / f"{name}.jsonl", b"".join(rows))
    taken = {one for expressions in sets.values() for one in expressions}
    held_out = (document(draw, one, data.writer) for one in sets["held_out"])
    write_documents(held_out, tokenizer, out / "pretrain_held_out")
    documents = islice(_documents(draw, data, taken), data.num_documents)
    manifest = write_documents(documents, tokenizer, out / "pretrain")
    report = ReasoningReport(
        seed=data.seed,
        num_operators=data.num_operators,
        writer=data.writer,
        num_documents=manifest.num_documents,
        num_tokens=manifest.num_tokens,
        num_questions=dict(data.num_questions),
        answer_tokens=sum(2 * left + 2 for left in range(data.num_operators)),
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    content = msgspec.json.format(msgspec.json.encode(report), indent=2)
    write_atomically(out / REPORT_FILE, content + b"\n")
    return report


def _finished(path: Path, data: ReasoningData) -> ReasoningReport | None:
    """Return the report of an earlier call with the same parameters."""
    if not path.exists():
        return None
    try:
        report = msgspec.json.decode(path.read_bytes(), type=ReasoningReport)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}; remove its directory") from None
    for name in ("seed", "num_operators", "writer", "num_documents", "num_questions"):
        was, asked = getattr(report, name), getattr(data, name)
        if was != asked:
            raise DataError(
                f"{path.parent} holds data with {name}={was}, but {asked} was requested; give "
                f"another --out"
            )
    return report


def question_row(expression: str) -> dict[str, object]:
    """Make the row of a question: its prompt, and the key of its answer.

    The id is the expression, so that answers to its text and to it as a user's turn can be
    compared.
    """
    key = {"last": str(value(expression)), "separator": SEPARATOR}
    prompt = expression + SEPARATOR
    return {"id": expression, "prompt": prompt, "answer": key, "task": "arithmetic"}


def document(draw: random.Random, expression: str, writer: Writer) -> str:
    """Return an expression and the writer's solution."""
    return expression + SEPARATOR + write_solution(draw, expression, writer)


def _deal(draw: random.Random, data: ReasoningData) -> Mapping[str, Sequence[str]]:
    """Assign expressions to every set of questions and to the held-out documents."""
    sizes = {**data.num_questions, "held_out": HELD_OUT_DOCUMENTS}
    needed = sum(sizes.values())
    found: dict[str, None] = {}
    for _ in range(_MOST_DRAWS * needed):
        if len(found) == needed:
            break
        found[draw_expression(draw, data.num_operators)] = None
    # Documents need expressions too: at least half of them remain.
    possible = 2**data.num_operators * 10 ** (data.num_operators + 1)
    if 2 * needed > possible or len(found) < needed:
        raise DataError(
            f"{needed} questions and held-out documents were requested of {possible} expressions "
            f"with {data.num_operators} operators, half of which are reserved for training; "
            f"request fewer, or more operators"
        )
    dealt = iter(found)
    return {name: list(islice(dealt, size)) for name, size in sizes.items()}


def _documents(draw: random.Random, data: ReasoningData, taken: set[str]) -> Iterator[str]:
    while True:
        expression = draw_expression(draw, data.num_operators)
        if expression not in taken:
            yield document(draw, expression, data.writer)
