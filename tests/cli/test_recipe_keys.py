"""`phi4 recipe keys` lists the reference of the recipe, for people and for programs."""

import json
from dataclasses import asdict

import pytest

from phi4.cli import main
from phi4.config.reference import KIND_TEXTS, reference


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(("recipe", "keys", *arguments))
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_every_key_is_a_line_and_its_meaning_follows(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys)
    lines, words = text.splitlines(), " ".join(text.split())
    for section in reference():
        assert f"{section.header} {section.text}" in words
        for key in section.keys:
            line = f"  {key.key} = {key.default_text}  ({key.type}; {key.kind})"
            assert line in lines
            assert f"{' '.join(line.split())} {key.text}" in words
    for kind, meaning in KIND_TEXTS.items():
        assert f"{kind}: {meaning}" in lines


def test_section_alone(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "batch")
    assert "batch.micro_batch_size = 1" in text and "optim." not in text


def test_json_has_every_field(capsys: pytest.CaptureFixture) -> None:
    rows = json.loads(printed(capsys, "--json"))
    assert rows == [asdict(key) for section in reference() for key in section.keys]


def test_unknown_section_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(("recipe", "keys", "optm"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "ConfigError: the recipe has no section or key 'optm'; did you mean optim?\n"
    )
