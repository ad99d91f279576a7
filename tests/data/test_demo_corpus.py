import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phi4.cli.data import app
from phi4.config import DataConfig, SourceConfig, TokenizerConfig
from phi4.data import HeldOut, Loader, load_tokenizer
from phi4.data.corpora import docstrings, standard_library_corpus
from phi4.data.token_file import TokenFile
from phi4.errors import DataError

FILES = ("code", "prose", "code_held_out", "prose_held_out")


def phi4_data(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    return out, phi4_data("demo", "--out", out, "--vocab-size", 1024)


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return standard_library_corpus(max_code_bytes=3_000_000)


def test_demo_writes_four_sources_that_the_loader_serves(demo: tuple[Path, str]) -> None:
    out, _ = demo
    tokenizer = load_tokenizer(TokenizerConfig(kind="bpe", path=str(out / "bpe.tiktoken")))
    assert tokenizer.vocab_size == 1024
    config = DataConfig(
        sequence_length=256,
        unit_tokens=256,
        sources=tuple(SourceConfig(name=name, path=str(out / name)) for name in FILES[:2]),
        held_out=tuple(SourceConfig(name=name, path=str(out / name)) for name in FILES[2:]),
    )
    layout = {"global_batch_size": 4, "micro_batch_size": 4, "dp_rank": 0, "dp_size": 1}
    (batch,) = Loader(config, tokenizer.facts, 1).next_step(**layout)
    assert len(tokenizer.decode(batch.tokens[0])) > 256
    ((batch,),) = HeldOut(config, tokenizer.facts, 1).batches(1, **layout)
    assert batch.tokens.max() < 1024


def test_demo_reports_sizes_and_entropy(demo: tuple[Path, str]) -> None:
    out, printed = demo
    report = json.loads((out / "corpus.json").read_bytes())
    counts: Counter[int] = Counter()
    for name in FILES:
        pair = TokenFile(out / name)
        sizes = {"num_documents": pair.num_documents, "num_tokens": pair.num_tokens}
        assert report["sources"][name] == sizes
        assert f"{pair.num_tokens} tokens" in printed
        if name in FILES[:2]:
            counts.update(pair.tokens.tolist())
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert report["unigram_entropy_nats"] == pytest.approx(entropy, rel=1e-9)
    assert f"{entropy:.4f} nats" in printed


def test_no_text_is_on_both_sides(corpus: dict[str, list[str]]) -> None:
    texts = [text for name in FILES for text in corpus[name]]
    assert len(set(texts)) == len(texts)
    assert all(len(corpus[name]) >= 3 for name in FILES)
    held_out = len(corpus["prose_held_out"])
    assert 0.02 < held_out / (held_out + len(corpus["prose"])) < 0.09


def test_docstrings_stay_on_the_side_of_their_module(corpus: dict[str, list[str]]) -> None:
    for code, prose in (FILES[:2], FILES[2:]):
        described = list(filter(None, map(docstrings, corpus[code])))
        assert described
        assert set(described) <= set(corpus[prose])


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
    assert sum(map(len, corpus["code"] + corpus["code_held_out"])) <= 3_000_000


def test_corpus_is_the_same_in_another_process(corpus: dict[str, list[str]]) -> None:
    program = (
        "import hashlib, json; from phi4.data.corpora import standard_library_corpus as build;"
        "text = json.dumps(build(max_code_bytes=3_000_000));"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", program],
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "1"},
    )
    assert output.strip() == hashlib.sha256(json.dumps(corpus).encode()).hexdigest()


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


def test_inspecting_a_damaged_pair_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.idx cannot be read"):
        phi4_data("inspect", tmp_path / "none")
