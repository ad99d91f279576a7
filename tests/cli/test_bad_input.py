"""Wrong input to all commands: a line per broken rule, exit code 2, nothing written over."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from phi4.cli import main
from phi4.config import TokenizerConfig
from phi4.data.vocabulary.tokenizer import load_tokenizer
from phi4.engine.platform import disconnect
from tests.support.runs import train_forked as train


def _files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _refused(copy: Path, *arguments: str) -> str:
    """The one line of a refusal that left every file as it was."""
    before = _files(copy)
    result = train(copy, *arguments)
    assert result.returncode == 2, result.stderr + result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert _files(copy) == before
    return lines[0]


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("run.stepz=3", "did you mean run.steps?"),
        ("run.steps='x'", "run.steps"),
        (
            "parallel.tensor=4",
            "parallel.tensor=4 does not divide num_key_value_heads=2; use",
        ),
        ("parallel.pipeline=3", "model.num_layers=2"),
        ("precision.fp8=torch", "leaves none of model.num_layers=2 for FP8; lower it or use"),
        ("run.steps", "expected section.key=value"),
    ],
)
def test_recipe_errors_name_key_and_remedy(
    argument: str, text: str, run: Path, capsys: pytest.CaptureFixture
) -> None:
    before = _files(run)
    with pytest.raises(SystemExit) as stop:
        main(["train", str(run / "recipe.toml"), argument])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
    assert _files(run) == before


def _lines_of_refusal(command: str, capsys: pytest.CaptureFixture) -> list[str]:
    """The lines on stderr of a command that ends with exit code 2 and prints nothing else."""
    try:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(command))
    finally:
        # A command that ends in an error leaves its groups to the end of its process.
        disconnect()
    printed, said = capsys.readouterr()
    assert (stop.value.code, printed) == (2, ""), said
    lines = said.splitlines()
    for line in lines:
        assert re.match(r"[A-Z]\w+Error: \S", line), said
    return lines


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train .", "recipe . is a directory; give a .toml file"),
        ("train tokens.bin", "recipe tokens.bin is not valid TOML"),
        ("train recipe.toml run.dir=/proc/x", "run.dir=/proc/x cannot be used"),
        ("train recipe.toml run.dir=recipe.toml", "name a directory that this user can create"),
        ("train recipe.toml run.stage=foo", "use one of pretrain, midtrain, sft, dpo"),
        ("generate missing hi", "no checkpoint in missing; give RUN/checkpoints/step_NNNNNNN"),
        ("generate run", "there is no prompt; give PROMPT or --prompts FILE"),
        ("generate run hi --log-probs", "add --json"),
        ("generate run hi --system x", "add --chat"),
        ("generate run hi --n 0", "--n: expected at least 1, got 0"),
        ("generate run hi --temperature x", "--temperature: expected a number, got x"),
        ("generate run hi --max-tokens 600", "lower max_tokens"),
        ("generate run hi --max-tokens 2 --top-p 2", "top_p=2"),
        ("generate run hi --prompts .", "--prompts=. is not a file; give JSON Lines"),
        ("generate run hi --max-tokens 2 parallel.tensor=4", "parallel.tensor=4 does not divide"),
        ("generate run hi tokenizer.path=tokens.bin", "give a file in tiktoken's format"),
        ("chat missing", "no checkpoint in missing"),
        ("serve missing", "no checkpoint in missing"),
        ("serve run --port 99999", "--port: expected at most 65535, got 99999"),
        ("plan recipe.toml --gpu b200", "'b200' is not one of 'h100', 'h200', 'a100'"),
        ("plan recipe.toml --gpus 0", "--gpus: expected at least 1, got 0"),
        ("report missing", "give the directory of a run"),
        ("report run --out .", "--out=. is a directory; name a file"),
        ("demo --seed 3", "--seed has no effect without --post-training"),
        ("launch slurm recipe.toml --dry-run --nodes x", "give 4, or MIN-MAX such as 2-4"),
        ("launch history run", "give the run.dir of a run that `phi4 launch slurm` submitted"),
        ("sweep run .", "sweep . is a directory; give a .toml file"),
        ("track compare run recipe.toml", "give the directory of a run"),
        ("track settle recipe.toml", "give the directory of a run"),
        ("verify parity recipe.toml --layouts bogus", "unknown layout bogus; known are"),
        ("verify resume recipe.toml --steps 1", "use at least 2"),
        ("verify preempt recipe.toml --work-dir /proc/x", "/proc/x: No such file or directory"),
        ("data inspect missing", "missing.idx cannot be read"),
        ("data ledger missing", "missing has no checkpoint; give the directory of a run"),
        ("data tokenize tokens.bin --out x", "its name does not determine its format"),
        ("data demo --out /proc/x", "/proc/x: No such file or directory"),
        ("data demo --vocab-size 3", "--vocab-size: expected at least 352, got 3"),
        ("data filter x --out d --accept-share 7", "--accept-share: expected at most 1, got 7"),
        ("data decontaminate --normalisation x", "'x' is not one of 'robust', 'paper'"),
        (
            "answers score missing --oracle exact",
            "answers missing cannot be read: No such file or directory; give a file of `phi4",
        ),
        (
            "answers score recipe.toml --oracle exact",
            "recipe.toml:1 is not an answer: Expected `object`, got `array`; draw answers with",
        ),
        ("answers score missing", "Missing option '--oracle'; see `phi4 answers score --help`"),
        (
            "pts show missing",
            "missing/trajectories.jsonl cannot be read: No such file or directory; give a dir",
        ),
        (
            "pts pairs missing --out x",
            "pivots missing cannot be read: No such file or directory; give a directory of `phi4",
        ),
        (
            "judge pairs --answers missing --judge oracle:exact --out j",
            "answers missing cannot be read: No such file or directory; give a file of `phi4",
        ),
        (
            "judge pairs --answers /dev/null --judge oracle:exact --out j",
            "there is no answer in /dev/null; draw some with `phi4 answers draw`",
        ),
        (
            "generate run/checkpoints/step_0000009 hi",
            "run/checkpoints/step_0000009 does not exist; give RUN for its newest checkpoint",
        ),
        ("pts pairs --out x", "give directories of `phi4 pts search` or --from-codelion"),
        (
            "pts select run --questions x --oracle bogus",
            "expected one of exact, choice, math, code",
        ),
        (
            "judge pairs --answers x --judge oracle:exact --out j pairs.bogus=3",
            "unknown key pairs.bogus; expected one of accuracy_margin, combine",
        ),
        ("dpo cache-ref recipe.toml", "data.reference_cache is not set"),
        ("recipe keys optim.bogus", "did you mean optim."),
        ("model info .", "recipe . is a directory; give a .toml file"),
        ("convert to-hf run recipe.toml", "exists and is not empty; give a new directory"),
        ("convert from-hf . x", "give the directory that holds config.json and the shards"),
        ("bench kernels --op x", "invalid choice: 'x'"),
        ("kernels show bogus", "no op 'bogus'; there are adamw, attention"),
    ],
)
def test_wrong_input_is_one_line_with_a_remedy(
    command: str,
    text: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(run)
    before = _files(run)
    (line,) = _lines_of_refusal(command, capsys)
    assert text in line
    assert _files(run) == before


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        (
            "train recipe.toml parallel.tensor=4 parallel.pipeline=3",
            ("parallel.tensor=4 does not divide", "pipeline=3 x virtual_pipeline=1"),
        ),
        (
            "train recipe.toml run.steps=x optim.beta1=y",
            ("recipe.toml: optim.beta1", "recipe.toml: run.steps"),
        ),
    ],
)
def test_every_broken_rule_has_its_line(
    command: str,
    texts: tuple[str, str],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(run)
    lines = _lines_of_refusal(command, capsys)
    assert len(lines) == 2
    for line, text in zip(lines, texts, strict=True):
        assert text in line


def test_missing_recipe_says_where_recipes_are(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "no/such.toml"])
    assert stop.value.code == 2
    assert "examples/recipes/" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest.json", "recipe.toml"])
def test_damaged_checkpoint_is_one_line_with_a_remedy(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(copy)
    path = Path("run/checkpoints/step_0000002", name)
    path.write_bytes(b"\xff")
    (line,) = _lines_of_refusal(f"generate {path.parent} hi --max-tokens 2", capsys)
    assert f"{path} is damaged: " in line
    assert line.endswith("; use another checkpoint")


def test_missing_data_is_named(copy: Path) -> None:
    (copy / "tokens.bin").unlink()
    assert "tokens.bin" in _refused(copy, "run.steps=4", "--change")


def test_truncated_tokens_are_refused(copy: Path) -> None:
    path = copy / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-400])
    assert "tokens.bin" in _refused(copy, "run.steps=4", "--change")


def test_data_that_changed_under_its_name_is_refused(copy: Path) -> None:
    path = copy / "tokens.manifest.json"
    path.write_text(path.read_text() + " ")
    line = _refused(copy, "run.steps=4", "--change")
    assert "DataError" in line and "source a holds other tokens" in line


def test_tokenizer_with_another_hash_is_refused(copy: Path) -> None:
    line = _refused(copy, f"tokenizer.sha256={'0' * 64}")
    assert "TokenizerError" in line and "0" * 64 in line


def test_tokenizer_larger_than_the_model_is_refused(copy: Path) -> None:
    line = _refused(copy, "model.vocab_size=350")
    assert "360 ids" in line and "350" in line


def test_token_beyond_the_vocabulary_is_named(copy: Path) -> None:
    facts = load_tokenizer(TokenizerConfig(kind="bpe", path=str(copy / "bpe.tiktoken"))).facts
    path = copy / "tokens.bin"
    ids = np.fromfile(path, dtype=np.int32)
    ids[:] = facts.vocab_size + 7
    ids.tofile(path)
    result = train(copy, "run.dir=new")
    assert result.returncode == 2
    assert str(facts.vocab_size + 7) in result.stderr and "document" in result.stderr


def test_another_model_does_not_continue_a_run(copy: Path) -> None:
    line = _refused(copy, "run.seed=9")
    assert "run.seed=1234, now 9" in line and "run.dir" in line


def test_schedule_change_asks_for_the_flag(copy: Path) -> None:
    assert "--change" in _refused(copy, "optim.learning_rate=0.5")


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_damaged_checkpoint_falls_back_to_the_one_before(damage: str, copy: Path) -> None:
    victim = next((copy / "run/checkpoints/step_0000002").glob("*.distcp"))
    if damage == "remove":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    result = train(copy)
    assert result.returncode == 0, result.stderr
    assert f"cannot resume from {victim.parent.relative_to(copy)}" in result.stdout
    assert "resumed from" in result.stdout and "(step 1)" in result.stdout
