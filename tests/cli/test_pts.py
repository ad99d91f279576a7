"""`phi4 pts`: a search from its command to its files, behind an endpoint and on a model on disk."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4.cli import main
from phi4.data.vocabulary.tokenizer import Tokenizer, rank_file_bytes
from phi4.pts.search.rows import read_pivots
from phi4.sampling.scripted import Script, ScriptedSampler
from tests.pts.search.endpoint import replying
from tests.sampling.endpoint_server import EndpointServer, serving
from tests.support.commands import command, write_model
from tests.support.ranks import RankPool
from tests.support.served import MODEL_NAME, served

GO, STAY, RIGHT, WRONG = map(ord, "gsRW")
BEHIND = {GO: 0.9, STAY: 0.2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Tokenizer, Path]:
    tokenizer = Tokenizer({bytes([value]): value for value in range(256)})
    path = tmp_path_factory.mktemp("ranks") / "bytes.tiktoken"
    path.write_bytes(rank_file_bytes(tokenizer.mergeable_ranks))
    return tokenizer, path


@pytest.fixture
def server(ranks) -> Iterator[EndpointServer]:
    tokenizer, _ = ranks
    with serving(replying(script_of(tokenizer), tokenizer)) as server:
        yield server


def script_of(tokenizer: Tokenizer) -> Script:
    """A model that goes or stays, then is right or wrong by the chance of that, then ends."""

    def script(ids: tuple[int, ...]) -> dict[int, float]:
        answer = ids[2:]
        if len(answer) == 0:
            return {GO: 0.5, STAY: 0.5}
        if len(answer) == 1:
            return {RIGHT: BEHIND[answer[0]], WRONG: 1 - BEHIND[answer[0]]}
        return {tokenizer.im_end_id: 1.0}

    return script


@pytest.fixture
def asked(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"Q{i}", "answer": ["gR", "sR"], "task": "t"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def phi4(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0), *capsys.readouterr()


def words_of(server: EndpointServer, ranks, asked: Path, out: Path) -> list[object]:
    return [
        *("pts", "search", f"{server.base_url}#phi", f"--ranks={ranks[1]}", "--no-chat"),
        *(f"--questions={asked}", "--oracle=exact", f"--out={out}", "--max-tokens=8"),
    ]


def test_search_and_show_from_the_command_line(capsys, server, ranks, asked, tmp_path) -> None:
    words, out = words_of(server, ranks, asked, tmp_path / "out"), tmp_path / "out"
    code, printed, err = phi4(capsys, *words)
    assert code == 0, err
    assert "questions: 2 read, 2 kept, 0 dropped" in printed
    assert "per pivot: " in printed and "without any effect is at most 0.1" in printed
    pivots = list(read_pivots(out / "pivots.jsonl"))
    found = {(one.token, one.position) for one in pivots}
    assert found & {(GO, 0), (STAY, 0)} and {position for _, position in found} <= {0, 1}
    for one in pivots:
        assert one.model == f"{server.base_url}#phi" and one.task == "t"
    code, printed, err = phi4(capsys, "pts", "show", out)
    assert code == 0, err
    assert "/right (0 of 4): right" in printed and "verdict" in printed
    code, _, err = phi4(capsys, "pts", "show", out, "--trajectory=4")
    assert (code, err.count("\n")) == (2, 1) and "has 4; count from 0" in err
    num_asked = len(server.asked)
    code, _, err = phi4(capsys, *words, "--seed=9")
    assert (code, err.count("\n")) == (2, 1) and "seed=0, but this one has seed=9" in err
    assert len(server.asked) == num_asked


def test_served_model_is_searched_at_any_temperature(capsys, ranks, asked, tmp_path) -> None:
    tokenizer, path = ranks
    with served(ScriptedSampler(script_of(tokenizer), tokenizer, 64), tokenizer) as server:
        place = f"{server.url}/v1#{MODEL_NAME}"
        words = [
            *("pts", "search", place, "--no-chat", f"--questions={asked}", "--oracle=exact"),
            *(f"--out={tmp_path / 'out'}", "--max-tokens=8", "--temperature=0.9"),
        ]
        code, printed, err = phi4(capsys, *words, f"--ranks={path}")
        assert code == 0, err
        assert "questions: 2 read, 2 kept, 0 dropped" in printed
        assert server.traffic.counts.failed == server.traffic.counts.cancelled == 0
        other = tmp_path / "other.tiktoken"
        other.write_bytes(rank_file_bytes(tokenizer.mergeable_ranks | {b"ab": 256}))
        code, _, err = phi4(capsys, *words, f"--ranks={other}")
        assert (code, err.count("\n")) == (2, 1)
        assert "give the rank file of the server's model with --ranks" in err
    code, _, err = phi4(capsys, *words, f"--ranks={path}")
    assert (code, err.count("\n")) == (2, 1) and "did not return its models" in err
    assert {one.position for one in read_pivots(tmp_path / "out" / "pivots.jsonl")} <= {0, 1}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--temperature=0.7", "--temperature=0.7, but an endpoint reports"),
        ("--top-p=0.9", "--top-p=0.9, but an endpoint reports"),
        ("--temperature=0", "always gives the same answer"),
        ("--system=x", "--system needs conversations"),
        ("--oracle=none", "--oracle=none is unknown"),
        ("--alpha=0", "alpha=0.0; expected a level"),
        ("--questions=absent", "absent"),
        ("parallel.tensor=2", "sets the layout of a local model"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_drawn(
    capsys, server, ranks, asked, tmp_path, option, message
) -> None:
    words = words_of(server, ranks, asked, tmp_path / "out")
    code, printed, err = phi4(capsys, *words, option)
    assert (code, printed) == (2, "")
    assert message in err and "Traceback" not in err
    assert server.asked == [] and not (tmp_path / "out").exists()


def test_directory_without_a_search_is_one_line(capsys, tmp_path) -> None:
    code, _, err = phi4(capsys, "pts", "show", tmp_path)
    assert (code, err.count("\n")) == (2, 1) and "trajectories.jsonl cannot be read" in err


@pytest.mark.slow
def test_search_on_a_model_on_disk(tmp_path, asked) -> None:
    """A model that knows nothing: every question is too hard, and is counted."""
    with RankPool(1) as pool:
        write_model(pool, tmp_path)
        words = ("pts", "search", tmp_path, f"--questions={asked}", "--oracle=exact")
        ended = command(pool, *words, f"--out={tmp_path / 'out'}", "--max-tokens=4", "--top-p=0.9")
    assert ended.code == 0, ended.err
    assert "questions: 2 read, 0 kept, 2 dropped (2 too hard)" in ended.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["completions"] == 32
