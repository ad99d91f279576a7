"""The commands of docs/preference_data.md work as they are written there."""

import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from phi4.cli import main
from phi4.pts.judged.recipe import JudgeRecipe
from tests.pts.answer_rows import Said, write_answers, write_ranks, write_rows
from tests.pts.test_judge_command import reply
from tests.pts.test_pivot_pairs import pivot
from tests.sampling.endpoint_server import serving

PAGE = (Path(__file__).parents[2] / "docs/preference_data.md").read_text(encoding="utf-8")
ENDPOINT = "http://127.0.0.1:8000/v1"


def blocks(language: str) -> list[str]:
    """The page's blocks of a language; commands have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
    return [text for name, text in found if name == language]


def commands() -> list[list[str]]:
    """The commands of the page, in their order."""
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def write_inputs(root: Path) -> None:
    """What the commands find: answers of three models, texts of others, and pivots."""
    texts = {"gpt": "5 Paris", "ours": "3 Lyon", "base": "1 Rome"}
    for model, text in texts.items():
        said = [
            Said("q", other, model, n, key="5 Paris") for n, other in enumerate((text, "5 Paris"))
        ]
        write_answers(root / f"{model}.jsonl", said)
    write_rows(root / "refusals.jsonl", [{"refusal": "I do not know."}])
    write_rows(root / "bogus.jsonl", [{"question": "q", "bogus": "Who?", "refusal": "Nobody."}])
    write_rows(root / "safety.jsonl", [{"prompt": "harm", "refusal": "No.", "unsafe": "Yes."}])
    for number, task in enumerate(("math", "python")):
        directory = root / f"runs/pts_{task}"
        directory.mkdir(parents=True)
        write_rows(
            directory / "pivots.jsonl",
            [pivot(place, task=task, prompt_ids=[number, 1]) for place in range(7)],
        )


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    ranks = write_ranks(tmp_path / "ranks")
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) == 10 and all(words[0] == "phi4" for words in found)
    with serving(reply) as server:
        for words in found:
            end = [f"--ranks={ranks}"]
            if words[1] == "judge":
                end += [f"--judge-ranks={ranks}"]
            if "--out" in words:
                os.makedirs(Path(words[words.index("--out") + 1]).parent, exist_ok=True)
            argv = [word.replace(ENDPOINT, server.base_url) for word in (*words[1:], *end)]
            with pytest.raises(SystemExit) as stop:
                main(argv)
            assert not stop.value.code, words
    assert {path.name for path in (tmp_path / "data").glob("**/*.bin")} == {
        "any_vs_any_overall.bin",
        "any_vs_any_accuracy.bin",
        "unknown.bin",
        "unknown_safety.bin",
        "best.bin",
        "pivotal.bin",
    }


def test_judge_recipe_shows_every_default() -> None:
    (block,) = (block for block in blocks("toml") if "[ask]" in block)
    assert tomllib.loads(block) == JudgeRecipe().model_dump()
