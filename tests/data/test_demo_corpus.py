import ast
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from phi4.cli.data import app
from phi4.config import DataConfig, SourceConfig, TokenizerConfig, load_recipe
from phi4.data.demo.corpora import (
    PHI4_SHARES,
    docstrings,
    exercises,
    phi4_corpus,
    standard_library_corpus,
)
from phi4.data.demo.post_training import ROW_TOKENS
from phi4.data.files.rejections import rejected_path
from phi4.data.files.token_file import TokenFile
from phi4.data.stream.kinds import open_source
from phi4.data.stream.loader import HeldOut, Loader
from phi4.data.stream.sources import read_source
from phi4.data.stream.units import ShardPool
from phi4.data.vocabulary.tokenizer import load_tokenizer
from phi4.errors import ConfigError, DataError

SOURCES = ("synthetic", "code", "web", "acquired")
FILES = (*SOURCES, *(f"{name}_held_out" for name in SOURCES))


def phi4_data(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return phi4_corpus(max_code_bytes=2_000_000)


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, list[str]]
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        # Parsing the standard library once is enough.
        patch.setattr("phi4.data.demo.corpus.phi4_corpus", lambda: corpus)
        return out, phi4_data("demo", "--out", out, "--vocab-size", 1024)


def test_demo_writes_the_sources_of_the_report_and_the_loader_blends_them(
    demo: tuple[Path, str],
) -> None:
    out, _ = demo
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path=str(out / "bpe.tiktoken")))
    assert tokenizer.vocab_size == 1024
    config = DataConfig(
        sequence_length=256,
        unit_tokens=256,
        sources=tuple(
            SourceConfig(name=name, path=str(out / name), weight=weight)
            for name, weight in PHI4_SHARES.items()
        ),
        held_out=tuple(SourceConfig(name=name, path=str(out / name)) for name in FILES[4:]),
    )
    layout = {"global_batch_size": 50, "micro_batch_size": 50, "dp_rank": 0, "dp_size": 1}
    loader = Loader(config, tokenizer.facts, 1)
    (batch,) = loader.next_step(**layout)
    assert len(tokenizer.decode(batch.tokens[0])) > 256
    drawn = {name: count["drawn"] for name, count in loader.state()["sources"].items()}
    assert drawn == {"synthetic": 20, "code": 10, "web": 15, "acquired": 5}
    ((batch,),) = HeldOut(config, tokenizer.facts, 1).batches(1, **layout)
    assert batch.tokens.max() < 1024


def test_tiny_recipe_blends_what_the_demo_writes() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "examples" / "recipes" / "tiny_pretrain.toml")
    assert {s.name: s.weight for s in recipe.data.sources} == PHI4_SHARES
    assert [Path(s.path).name for s in recipe.data.sources] == list(SOURCES)
    assert [Path(s.path).name for s in recipe.data.held_out] == list(FILES[4:])


def test_demo_reports_sizes_and_entropy(demo: tuple[Path, str]) -> None:
    out, printed = demo
    report = json.loads((out / "corpus.json").read_bytes())
    frequency: Counter[int] = Counter()
    for name in FILES:
        pair = TokenFile(out / name)
        sizes = {"num_documents": pair.num_documents, "num_tokens": pair.num_tokens}
        assert report["sources"][name] == sizes
        assert f"{pair.num_tokens} tokens" in printed
        for token, count in Counter(pair.tokens.tolist()).items():
            frequency[token] += PHI4_SHARES.get(name, 0) * count / pair.num_tokens
    entropy = -sum(p * math.log(p) for p in frequency.values() if p)
    assert report["unigram_entropy_nats"] == pytest.approx(entropy, rel=1e-9)
    assert f"{entropy:.4f} nats" in printed


def test_garbage_is_the_web_in_another_order(demo: tuple[Path, str]) -> None:
    out, _ = demo
    web, garbage = TokenFile(out / "web"), TokenFile(out / "garbage")
    assert garbage.num_documents == web.num_documents
    is_moved = []
    for index in range(web.num_documents):
        one, other = (pair.document(index).tolist() for pair in (web, garbage))
        assert sorted(one) == sorted(other) and one[-1] == other[-1]
        is_moved.append(one != other)
    assert sum(is_moved) > 0.9 * len(is_moved)


def test_no_text_is_on_both_sides(corpus: dict[str, list[str]]) -> None:
    texts = [text for name in FILES for text in corpus[name]]
    assert len(set(texts)) == len(texts)
    assert all(len(corpus[name]) >= 3 for name in FILES)
    for name, most in zip(SOURCES, (0.09, 0.09, 0.09, 0.2), strict=True):
        held_out = len(corpus[f"{name}_held_out"])
        assert 0.01 < held_out / (held_out + len(corpus[name])) < most


def test_all_that_is_made_of_a_module_stays_on_its_side(corpus: dict[str, list[str]]) -> None:
    for side in ("", "_held_out"):
        described = list(filter(None, map(docstrings, corpus["code" + side])))
        assert described
        assert set(described) <= set(corpus["web" + side])
        answers = [text.partition("Answer:\n\n")[2] for text in corpus["synthetic" + side]]
        code = " ".join("".join(corpus["code" + side]).split())
        assert all(" ".join(answer.split("\n")[0].split()) in code for answer in answers)


def json_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("side", ["", "_held_out"])
def test_preferences_are_the_lines_of_an_answer_in_two_orders(
    demo: tuple[Path, str], side: str
) -> None:
    out, _ = demo
    answers = {row["messages"][-1]["content"] for row in json_rows(out / f"chats{side}.jsonl")}
    rows = json_rows(out / f"preferences{side}.jsonl")
    assert rows
    for row in rows:
        assert row["chosen"] in answers and row["chosen"] != row["rejected"]
        chosen, rejected = (sorted(row[name].split("\n")) for name in ("chosen", "rejected"))
        assert chosen == rejected


@pytest.mark.parametrize("side", ["", "_held_out"])
def test_a_pivot_chooses_what_follows_in_the_conversation(
    demo: tuple[Path, str], side: str
) -> None:
    out, _ = demo
    pivots, chats = TokenFile(out / f"pivots{side}"), TokenFile(out / f"chats{side}")
    # Both in the order of the exercises; not every conversation has pivots.
    conversations = iter(range(chats.num_documents))
    for index in range(pivots.num_documents):
        ids, positions, chosen, rejected = pivots.sequences(index)
        document = next(
            i for i in conversations if np.array_equal(chats.document(i)[: ids.size], ids)
        )
        assert positions.size and positions[-1] == ids.size - 1
        assert np.array_equal(chosen, chats.document(document)[positions + 1])
        assert chats.document_mask(document)[positions + 1].all()
        assert np.array_equal(rejected, ids[positions]) and (chosen != rejected).all()
    assert pivots.num_documents


def test_no_conversation_preference_or_pivot_is_on_both_sides(demo: tuple[Path, str]) -> None:
    out, _ = demo
    for name, column in (("chats", "messages"), ("preferences", "chosen"), ("pivots", "ids")):
        training, held_out = (
            {json.dumps(row[column]) for row in json_rows(out / f"{name}{side}.jsonl")}
            for side in ("", "_held_out")
        )
        assert held_out and not training & held_out


@pytest.mark.parametrize("side", ["", "_held_out"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("chats", "conversations"), ("preferences", "pairs"), ("pivots", "pivots")],
)
def test_every_row_is_in_a_source_or_listed(
    demo: tuple[Path, str], name: str, kind: str, side: str
) -> None:
    prefix = demo[0] / f"{name}{side}"
    facts = load_tokenizer(TokenizerConfig(kind="bpe", path=str(demo[0] / "bpe.tiktoken"))).facts
    manifest = TokenFile(prefix).verify()
    listed = Path(rejected_path(prefix))
    reasons = [row["reason"] for row in json_rows(listed)] if listed.exists() else []
    assert all(reason.startswith("longer than a row: ") for reason in reasons)
    assert len(reasons) == manifest.num_rejected
    num_rows = len(json_rows(prefix.with_name(f"{prefix.name}.jsonl")))
    assert num_rows == manifest.num_documents + manifest.num_rejected
    config = SourceConfig(name=name, path=str(prefix), kind=kind, overlong="drop")
    data = DataConfig(sequence_length=ROW_TOKENS, unit_tokens=ROW_TOKENS)
    source = open_source(config, read_source(config.path, facts), ShardPool(4), facts, data)
    assert source.num_units


def test_exercises_are_functions_without_their_description() -> None:
    source = '''class A:
    def f(self, x):
        """Does f.

        Twice."""
        y = x  # kept
        return y

    def undocumented(self): return 1
    def empty(self):
        """Only this."""
'''
    (exercise,) = exercises(ast.parse(source), source)
    assert exercise == (
        "Write the function `f`.\n\nDoes f.\n\nTwice.\n\nAnswer:\n\n"
        "def f(self, x):\n    y = x  # kept\n    return y\n"
    )


def test_prose_is_web_and_acquired(
    corpus: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4.data.demo.corpora.phi4_corpus", lambda max_code_bytes: dict(corpus))
    plain = standard_library_corpus()
    assert set(plain) == {"code", "prose", "code_held_out", "prose_held_out"}
    for side in ("", "_held_out"):
        assert plain["code" + side] == corpus["code" + side]
        assert set(plain["prose" + side]) == {*corpus["web" + side], *corpus["acquired" + side]}


def test_docstrings_carry_the_names_they_describe() -> None:
    source = '''"""Top."""
class A:
    """An A."""
    def f(self):
        """Does f.

        Twice."""
def bare(): pass
'''
    assert docstrings(source) == "Top.\n\nA\n\nAn A.\n\nA.f\n\nDoes f.\n\nTwice."
    assert docstrings("def") is None


def test_code_is_bounded(corpus: dict[str, list[str]]) -> None:
    assert sum(map(len, corpus["code"] + corpus["code_held_out"])) <= 2_000_000


def test_corpus_is_the_same_in_another_process() -> None:
    program = (
        "import hashlib, json; from phi4.data.demo import corpora;"
        "every = list(corpora._sources()); corpora._sources = lambda: every[::12];"
        "text = json.dumps(corpora.phi4_corpus(max_code_bytes=300_000));"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    one, other = (
        subprocess.check_output(
            [sys.executable, "-c", program],
            text=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed},
        )
        for seed in "12"
    )
    assert one == other and len(one.strip()) == 64


def test_command_line_round_trip(demo: tuple[Path, str], tmp_path: Path) -> None:
    ranks = demo[0] / "bpe.tiktoken"
    (tmp_path / "x.txt").write_text("def f(self): return 1\n" * 3)
    prefix = tmp_path / "out" / "x"
    printed = phi4_data("tokenize", tmp_path / "x.txt", "--out", prefix, "--ranks", ranks)
    assert "1 documents" in printed
    shown = phi4_data("inspect", prefix, "--ranks", ranks, "--samples", 1)
    assert "def f(self): return 1\ndef f" in shown and "median" in shown
    assert "checksums match" in phi4_data("verify", prefix)
    Path(f"{prefix}.manifest.json").unlink()
    assert "no manifest" in phi4_data("inspect", prefix)
    phi4_data("adopt", prefix, "--ranks", ranks)
    assert "checksums match" in phi4_data("verify", prefix)


def test_shards_of_two_jobs_merge_into_the_bytes_of_one(
    demo: tuple[Path, str], tmp_path: Path
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "def {name}(): pass"}}\n' * 5)
    inputs = [tmp_path / f"{name}.jsonl" for name in "abc"]
    options = ("--ranks", demo[0] / "bpe.tiktoken", "--seed", 3)
    phi4_data("tokenize", *inputs, "--out", tmp_path / "one", *options, "--workers", 1)
    for shard in ("1/2", "0/2"):
        printed = phi4_data(
            "tokenize", *inputs, "--out", tmp_path / "two", *options, "--shard", shard
        )
        assert f"run `phi4 data merge {tmp_path}/two`" in printed
    assert "15 documents" in phi4_data("merge", tmp_path / "two")
    for suffix in ("bin", "idx", "manifest.json"):
        one, two = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
    assert "tokens: 15" in phi4_data("inspect", tmp_path / "two")


@pytest.mark.parametrize("shard", ["2/2", "1", "a/2", "-1/2"])
def test_a_shard_that_is_none_is_refused(
    demo: tuple[Path, str], tmp_path: Path, shard: str
) -> None:
    (tmp_path / "x.txt").write_text("x")
    options = ("--ranks", demo[0] / "bpe.tiktoken", f"--shard={shard}")
    with pytest.raises(ConfigError, match=f"--shard {shard}; expected I/N"):
        phi4_data("tokenize", tmp_path / "x.txt", "--out", tmp_path / "p", *options)


def test_inspecting_a_damaged_pair_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.idx cannot be read"):
        phi4_data("inspect", tmp_path / "none")
