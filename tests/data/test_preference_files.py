"""`phi4 data pairs`: preference rows into token files, and what `inspect` and `tokenize` say."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from phi4.cli import main
from phi4.config import TokenizerConfig
from phi4.data.files import atomic_files
from phi4.data.files.inputs import find_inputs
from phi4.data.files.token_file import TokenFile
from phi4.data.preference.write import write_preferences
from phi4.data.vocabulary.chat import chat_template_sha256
from phi4.data.vocabulary.tokenizer import Tokenizer, load_tokenizer
from phi4.errors import DataError, DiskFullError

PAIRS = [{"prompt": f"cat {i}", "chosen": "the cat", "rejected": "the mat" * i} for i in (1, 2, 3)]
PIVOTS = [
    {"prompt_ids": [5, 6], "chosen_id": 7, "rejected_id": 8},
    {
        "ids": [9, 10, 11, 12],
        "pivots": [
            {"position": 3, "chosen_id": 1, "rejected_id": 2},
            {"position": 0, "chosen_id": 3, "rejected_id": 4},
        ],
    },
]
BAD = [
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"prompt": "q", "chosen": "", "rejected": "a"},
    {"prompt": "q", "chosen": "a", "rejected": "the cat sat on the mat " * 40},
    {"text": "a document"},
]


@pytest.fixture
def tokenizer(config: TokenizerConfig) -> Tokenizer:
    return load_tokenizer(config)


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(inputs: list[Path], prefix: Path, tokenizer: Tokenizer, **options: object):
    options = {"row_tokens": 100, "max_rejected": 10, **options}
    return write_preferences(find_inputs(inputs), prefix, tokenizer, **options)


def test_megatron_opens_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    written = write([lines(tmp_path / "x.jsonl", PAIRS)], tmp_path / "p", tokenizer)
    dataset, file = IndexedDataset(str(tmp_path / "p")), TokenFile(tmp_path / "p")
    assert len(dataset) == 6 and dataset.document_indices.tolist() == [0, 2, 4, 6]
    for index, row in enumerate(PAIRS):
        for side, name in enumerate(("chosen", "rejected")):
            ids = dataset[2 * index + side].tolist()
            assert ids == file.sequences(index)[side].tolist()
            prompt = f"<|im_start|>user<|im_sep|>{row['prompt']}<|im_end|>"
            answer = f"<|im_start|>assistant<|im_sep|>{row[name]}<|im_end|>"
            assert tokenizer.decode(ids) == prompt + answer
    manifest = file.verify()
    assert (manifest.kind, manifest.num_documents, manifest.num_rejected) == ("pairs", 3, 0)
    assert manifest.chat_template_sha256 == chat_template_sha256()
    assert written.max_labels == file.document_lengths().max() - 2


def test_megatron_opens_pivots(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write([lines(tmp_path / "x.jsonl", PIVOTS)], tmp_path / "p", tokenizer)
    dataset = IndexedDataset(str(tmp_path / "p"))
    expected = [[5, 6], [1], [7], [8], [9, 10, 11, 12], [0, 3], [3, 1], [4, 2]]
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == [0, 4, 8]
    manifest = TokenFile(tmp_path / "p").verify()
    assert (manifest.kind, manifest.num_documents, manifest.mask_sha256) == ("pivots", 2, None)
    assert manifest.chat_template_sha256 is None


def test_every_row_is_written_or_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = lines(tmp_path / "x.jsonl", [PAIRS[0], *BAD, PAIRS[1]])
    path.write_text(path.read_text() + "\n{\n")
    (tmp_path / "y.txt").write_text("text")
    written = write([path, tmp_path / "y.txt"], tmp_path / "p", tokenizer)
    listed = [json.loads(line) for line in (tmp_path / "p.rejected.jsonl").open()]
    places = [(Path(row["input"]).name, row["line"]) for row in listed]
    assert places == [("x.jsonl", n) for n in (2, 3, 4, 5, 7, 8)] + [("y.txt", 0)]
    starts = ["chosen and rejected are equal", "chosen has an empty answer", "longer than a row"]
    assert all(row["reason"].startswith(s) for row, s in zip(listed, starts, strict=False))
    assert written.num_rows == written.num_preferences + len(listed) == 9
    assert written.reasons.total() == written.manifest.num_rejected == len(listed)
    assert written.reasons["longer than a row"] == 1


def test_forms_of_files_give_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lists = [
        {
            "prompt": row["prompt"],
            **{
                name: [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row[name]},
                ]
                for name in ("chosen", "rejected")
            },
            "messages": None,
            "score": float("nan"),
        }
        for row in PAIRS
    ]
    write([lines(tmp_path / "a.jsonl", PAIRS)], tmp_path / "a", tokenizer)
    packed = gzip.compress(lines(tmp_path / "b.json", lists).read_bytes())
    (tmp_path / "b.json.gz").write_bytes(packed)
    pq.write_table(pa.Table.from_pylist(lists), tmp_path / "c.parquet")
    for name in ("b.json.gz", "c.parquet"):
        write([tmp_path / name], tmp_path / name[0], tokenizer)
        for suffix in ("bin", "idx", "mask", "manifest.json"):
            a, other = (Path(f"{tmp_path / prefix}.{suffix}") for prefix in ("a", name[0]))
            assert other.read_bytes() == a.read_bytes()


def test_ids_of_parquet_and_of_lenient_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    columns = dict.fromkeys(key for row in PIVOTS for key in row)
    table = pa.Table.from_pylist([columns | row for row in PIVOTS])
    pq.write_table(table, tmp_path / "a.parquet")
    write([tmp_path / "a.parquet"], tmp_path / "a", tokenizer)
    nan = [{**row, "score": float("nan")} for row in PIVOTS]
    write([lines(tmp_path / "b.jsonl", nan)], tmp_path / "b", tokenizer)
    assert np.array_equal(TokenFile(tmp_path / "a").tokens, TokenFile(tmp_path / "b").tokens)
    assert TokenFile(tmp_path / "b").num_documents == 2


def left(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.startswith("p"))


def test_failed_job_leaves_no_token_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = lines(tmp_path / "x.jsonl", [*PAIRS, PIVOTS[0]])
    message = r"the inputs mix pairs and pivots: .*x\.jsonl:1 has the first kind, .*x\.jsonl:4 the"
    with pytest.raises(DataError, match=message):
        write([mixed], tmp_path / "p", tokenizer)
    assert left(tmp_path) == []
    with pytest.raises(DataError, match=r"none of 4 rows is a preference, 1 of them because: "):
        write([lines(tmp_path / "y.jsonl", BAD)], tmp_path / "p", tokenizer)
    bad = lines(tmp_path / "z.jsonl", [*PAIRS, *BAD])
    with pytest.raises(DataError, match=r"more than 3 rows are bad; see .*p\.rejected\.jsonl"):
        write([bad], tmp_path / "p", tokenizer, max_rejected=3)
    assert left(tmp_path) == ["p.rejected.jsonl"]
    write([bad], tmp_path / "p", tokenizer, max_rejected=4)
    before = {name: (tmp_path / name).read_bytes() for name in left(tmp_path)}
    with pytest.raises(DataError, match="exists; give another --out, or --overwrite"):
        write([lines(tmp_path / "v.jsonl", PAIRS[1:])], tmp_path / "p", tokenizer)

    def refuse(stream: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(atomic_files, "_sync_and_close", refuse)
        write([bad], tmp_path / "p", tokenizer, overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in left(tmp_path)} == before
    write([tmp_path / "v.jsonl"], tmp_path / "p", tokenizer, overwrite=True)
    assert TokenFile(tmp_path / "p").verify().num_documents == 2
    assert "p.rejected.jsonl" not in left(tmp_path)


@pytest.fixture
def run(config: TokenizerConfig, capsys: pytest.CaptureFixture):
    def run(command: str, *arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["data", command, *map(str, arguments), "--ranks", config.path])
        out = capsys.readouterr()
        assert bool(ended.value.code) == bool(out.err)
        return out.out + out.err

    return run


def test_commands_on_pairs(run, tmp_path: Path) -> None:
    path, prefix = lines(tmp_path / "x.jsonl", [*PAIRS, *BAD[:2], BAD[0]]), tmp_path / "p"
    printed = run("pairs", path, "--out", prefix, "--row-tokens", 100)
    assert "3 pairs from 6 rows, 3 rows left out" in printed
    assert "        2  chosen and rejected are equal; remove the row" in printed
    assert "        1  chosen has an empty answer" in printed and "p.rejected.jsonl" in printed
    assert "labels per pair: mean" in printed
    shown = run("inspect", prefix, "--samples", 1)
    assert "3 pairs, 3 documents" in shown and chat_template_sha256() in shown
    prompt = "<|im_start|>user<|im_sep|>cat 1<|im_end|><|im_start|>assistant<|im_sep|>"
    assert f"prompt: {prompt}\nchosen: the cat<|im_end|>\nrejected: the mat<|im_end|>" in shown


def test_commands_on_pivots(run, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode("the cat sat")
    better, worse = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    pivot = {"position": len(ids) - 1, "chosen_id": better, "rejected_id": worse}
    path = lines(tmp_path / "x.jsonl", [{"ids": ids, "pivots": [pivot]}])
    printed = run("pairs", path, "--out", tmp_path / "p")
    assert "1 pivots of 1 trajectories from 1 rows, 0 rows left out" in printed
    shown = run("inspect", tmp_path / "p", "--samples", 1)
    assert "1 pivots, 1 documents" in shown
    assert f"position {len(ids) - 1}: 'the cat sat' then 'a', not 'b'" in shown


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [PAIRS[0], {"chosen": [], "rejected": []}, {"context": [], "completions": [1]}, *PIVOTS],
)
def test_tokenize_names_the_command_for_preferences(
    run, tmp_path: Path, form: str, row: dict
) -> None:
    path = tmp_path / f"x.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        lines(path, [row])
    assert "`phi4 data pairs`" in run("tokenize", path, "--out", tmp_path / "p", "--workers", 1)
