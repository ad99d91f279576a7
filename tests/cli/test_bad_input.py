"""Wrong input to `phi4 train`: one clear line, exit code 2, nothing written over."""

from pathlib import Path

import numpy as np
import pytest

from phi4.cli import main
from phi4.config import TokenizerConfig
from phi4.data.vocabulary.tokenizer import load_tokenizer
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


def test_missing_recipe_says_where_recipes_are(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "no/such.toml"])
    assert stop.value.code == 2
    assert "examples/recipes/" in capsys.readouterr().err


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
