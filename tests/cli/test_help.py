"""What `phi4` says of itself: help, versions, and one line for whatever is mistyped."""

import re
import subprocess
import sys
from importlib import import_module, metadata

import pytest

import phi4
from phi4.cli import COMMANDS, GROUPS, main


def outcome(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `phi4 ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0), *capsys.readouterr()


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_its_docstring(command: str, capsys: pytest.CaptureFixture) -> None:
    code, printed, _ = outcome(capsys, command, "--help")
    function = getattr(import_module(f"phi4.cli.{command}"), command)
    assert code == 0
    # Markdown shows what is between backticks without them.
    assert words(function.__doc__.replace("`", "")) in words(printed)
    # More than the line of the list.
    assert len(words(function.__doc__)) > 2 * len(COMMANDS[command])


def test_paragraphs_of_a_docstring_stay_apart(capsys: pytest.CaptureFixture) -> None:
    _, printed, _ = outcome(capsys, "train", "--help")
    lines = [line.strip() for line in printed.splitlines()]
    begin = next(i for i, line in enumerate(lines) if line.startswith("Exit codes: 0 finished"))
    assert lines[begin - 1] == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--help", "train"]])
def test_help_lists_every_command_in_a_line(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    code, printed, _ = outcome(capsys, *arguments)
    assert code == 0
    for name, text in (COMMANDS | GROUPS).items():
        assert f"{name} {text}" in words(printed)


def test_version_names_what_decides_without_loading_it() -> None:
    script = (
        "import sys\nfrom phi4.cli import main\n"
        "try:\n    main(['--version'])\n"
        "finally:\n    assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"phi4 {phi4.__version__}",
        f"torch {metadata.version('torch')}",
        f"megatron-core {metadata.version('megatron-core')}",
    ]


def test_version_says_what_is_not_installed(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    code, printed, _ = outcome(capsys, "--version")
    assert code == 0
    assert printed.splitlines()[1:] == ["torch is not installed", "megatron-core is not installed"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nope"], r"No such option: --nope; see `phi4 --help`"),
        (["nope"], r"No such command 'nope'; see `phi4 --help`"),
        (["train", "--wrong"], r"No such option: --wrong; see `phi4 train --help`"),
        (["train"], r"Missing argument .*; see `phi4 train --help`"),
        (["plan", "x.toml", "--gpus", "0"], r"--gpus: expected at least 1, got 0; .*plan --help`"),
        (["data", "inspect", "x", "--nope"], r"No such option: --nope; see `phi4 data inspect"),
    ],
)
def test_mistyped_command_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture
) -> None:
    code, printed, said = outcome(capsys, *arguments)
    assert (code, printed) == (2, "")
    (only,) = said.splitlines()
    assert re.fullmatch(f"UsageError: {line}.*", only)


def test_group_without_a_command_prints_its_help(capsys: pytest.CaptureFixture) -> None:
    code, printed, said = outcome(capsys, "bench")
    assert code == 2
    assert GROUPS["bench"] in printed + said and "UsageError" not in printed + said


def test_help_states_the_rule_of_errors(capsys: pytest.CaptureFixture) -> None:
    _, printed, _ = outcome(capsys, "--help")
    assert "exit code 2 and one line per broken rule on stderr" in words(printed)
