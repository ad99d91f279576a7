"""trl's own trainer reads the pairs that are written for it as the ids that the model drew."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from phi4.convert.hf_tokenizer import write_tokenizer
from phi4.pts.pairs.job import PairFormat
from tests.pts.answer_rows import TOKENIZER
from tests.pts.test_pivot_pairs import ANSWER, PROMPT, made, pivot
from tests.support.waiting import LONG_SECONDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_trl_encodes_exported_pairs_to_their_ids_and_appends_an_end(tmp_path: Path) -> None:
    positions, raised = (1, 3, 4), (True, False, True)
    pivots = [pivot(n, raises=raises) for n, raises in zip(positions, raised, strict=True)]
    assert ANSWER[2] == TOKENIZER.encode(" ")[0]
    rows, report = made(tmp_path, [*pivots, pivot(2)], form=PairFormat.TRL)
    # A space in front of the end would be read as nothing.
    assert len(rows) == 3 and report.left_out.total() == 1
    path, result = tmp_path / "rows.jsonl", tmp_path / "result.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer", TOKENIZER, 256)
    command = [
        *(ROOT / ".venv-trl/bin/python", ROOT / "tests/support/trl_tokens.py"),
        *(tmp_path / "tokenizer", path, result),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, timeout=LONG_SECONDS)
    said = json.loads(result.read_text())
    eos = said["eos"]
    for row, position, raises in zip(said["rows"], positions, raised, strict=True):
        token, other = ANSWER[position], 90
        chosen, rejected = (token, other) if raises else (other, token)
        assert row["prompt_ids"] == [*PROMPT, *ANSWER[:position]]
        assert row["chosen_ids"] == [chosen, eos]
        assert row["rejected_ids"] == [rejected, eos]
