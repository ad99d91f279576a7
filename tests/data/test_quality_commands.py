"""`phi4 data decontaminate`, `deduplicate` and `filter` from the command line."""

import base64
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import typer
from typer.testing import CliRunner

from phi4.cli.data_quality import register
from phi4.data.screens.quality.filter import CorruptionLimit
from phi4.errors import DataError

SENTENCE = "when one of the crew who weighs fifty kilograms is replaced by a new man today"


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def run(app: typer.Typer, *arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_decontaminate(app: typer.Typer, tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", "clean", SENTENCE.replace(" ", "\n").upper())
    bench = rows(tmp_path / "boats.jsonl", SENTENCE + " and so on and on and on", "short")
    common = ("decontaminate", source, "--benchmark", bench)
    printed = run(app, *common, "--out", tmp_path / "out")
    assert "2 rows, 1 kept; quarantined: 1 13-gram match" in printed
    (counts,) = (line.split() for line in printed.splitlines() if line.startswith("boats"))
    assert counts == ["boats", "2", "1", "1", "1", "0", "0"]
    printed = run(app, *common, "--out", tmp_path / "paper", "--normalisation", "paper")
    assert "2 rows, 2 kept" in printed
    reference = rows(tmp_path / "reference.jsonl", SENTENCE, SENTENCE)
    loss_mask = ("--reference", reference, "--contaminated", "1.0", "--info", "0.9")
    printed = run(app, *common, "--out", tmp_path / "allowed", *loss_mask)
    assert "4 13-grams of the benchmarks are on the allow-list" in printed
    # Allowed are 13-grams only: the row shares all of its 7-grams.
    assert "2 rows, 1 kept; quarantined: 1 7-gram match" in printed
    report = json.loads((tmp_path / "allowed" / "decontaminate.report").read_text())
    words = SENTENCE.split()
    expected = {" ".join(words[start : start + 13]) for start in range(len(words) - 12)}
    assert set(report["allowed_13grams"]) == expected
    assert report["thresholds"] == {"info": 0.9, "contaminated": 1.0}


@pytest.mark.slow
def test_self_test_on_files_of_ones_own(app: typer.Typer, tmp_path: Path) -> None:
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    bench = rows(tmp_path / "own.jsonl", *(" ".join(words[i : i + 20]) for i in range(0, 100, 20)))
    clean = rows(tmp_path / "clean.jsonl", *(f"plain text number {i}\n\n" * 30 for i in range(4)))
    printed = run(app, "decontaminate", clean, "--benchmark", bench, "--self-test")
    lines = [line.split() for line in printed.splitlines()]
    assert ["verbatim", "2", "1.0000", "1.0000", "1.0000", "1.0000"] in lines
    assert "robust: 7-gram thresholds in use info 0.1, contaminated 0.2" in printed
    assert "robust, measuring half: 2 items, verbatim" in printed
    assert "paper, choosing thresholds: " in printed


@pytest.mark.parametrize(
    "arguments", [(), ("rows.jsonl",), ("rows.jsonl", "--out", "x"), ("--out", "x")]
)
def test_decontaminate_says_what_it_needs(app: typer.Typer, arguments) -> None:
    with pytest.raises(DataError, match="needs rows, --benchmark FILE and --out DIRECTORY"):
        run(app, "decontaminate", *arguments)


def test_deduplicate(app: typer.Typer, tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", SENTENCE, SENTENCE, SENTENCE.upper())
    out = ("--out", tmp_path / "out")
    printed = run(app, "deduplicate", source, *out)
    assert "3 rows, 1 kept; quarantined: 1 exact duplicate, 1 near duplicate" in printed
    printed = run(app, "deduplicate", source, "--out", tmp_path / "exact", "--exact")
    assert "3 rows, 2 kept; quarantined: 1 exact duplicate" in printed


def test_filter(app: typer.Typer, tmp_path: Path) -> None:
    texts = [topics[name] for name in sorted(topics)]
    normal = rows(tmp_path / "normal.jsonl", *texts)
    source = rows(tmp_path / "rows.jsonl", texts[0], "0123456789abcdef" * 20, "kurz")
    common = ("filter", source, "--reference", normal, "--accept-share", "0.5")
    printed = run(app, *common, "--out", tmp_path / "out")
    assert "3 rows, 2 kept; quarantined: 1 " in printed
    wrong = "phi4.data.screens.decontaminate.normalise:paper"
    language = ("--identify", wrong, "--languages", "en")
    with pytest.raises(DataError, match=r"paper returned \[.* expected a language code"):
        run(app, *common, "--out", tmp_path / "wrong", *language)


def test_text_field_of_rows_and_reference(app: typer.Typer, tmp_path: Path) -> None:
    normal = rows(tmp_path / "normal.jsonl", *topics.values())
    source = tmp_path / "rows.jsonl"
    for path in (normal, source):
        text = normal.read_text().replace('{"text": ', '{"content": ')
        path.write_text(text)
    common = (source, "--out")
    with pytest.raises(DataError, match=r"all \d+ rows are bad .*--text-field"):
        run(app, "deduplicate", *common, tmp_path / "none")
    field = ("--text-field", "content")
    bench = rows(tmp_path / "bench.jsonl", SENTENCE)
    for number, command in enumerate(
        (
            ("deduplicate",),
            ("decontaminate", "--benchmark", bench, "--reference", normal),
            ("filter", "--reference", normal),
        )
    ):
        printed = run(app, *command, *field, *common, tmp_path / str(number))
        assert "bad row" not in printed and " 0 kept" not in printed


def test_filter_fitted_to_corrupted_inputs_keeps_nothing(app: typer.Typer, tmp_path: Path) -> None:
    passages = [text[:800] for text in topics.values() if len(text) > 800]
    noise = (random.Random(i).randbytes(600) for i in range(2 * len(passages)))
    garbage = [base64.b64encode(raw).decode() for raw in noise]
    mixed = rows(tmp_path / "mixed.jsonl", *passages, *garbage)
    refusal = (
        rf"{len(passages)} of {3 * len(passages)} texts would be quarantined as corrupted "
        r"\(\d+ .*compression ratio.*\), the limit is 10%; nothing was kept: normal was learned "
        r"from the inputs .*quarantine\.rejects\.part, then give --reference .*--accept-share"
    )
    with pytest.raises(DataError, match=refusal):
        run(app, "filter", mixed, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["quarantine.rejects.part"]
    normal = rows(tmp_path / "normal.jsonl", *passages)
    loss_mask = ("--reference", normal, "--accept-share", "0.7")
    run(app, "filter", mixed, "--out", tmp_path / "out", *loss_mask)
    kept = [json.loads(line)["text"] for line in (tmp_path / "out/mixed.jsonl").open()]
    assert kept == passages


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_accepted_share_is_a_share(share: float) -> None:
    with pytest.raises(DataError, match=r"accepted share .*; expected 0 to 1"):
        CorruptionLimit(None, share, "")
