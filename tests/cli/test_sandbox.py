"""`phi4 sandbox check` says whether the sandbox holds, in a table and an exit code."""

import pytest

from phi4.cli import main, sandbox
from phi4.errors import PlatformError
from phi4.oracles.sandbox import Ended, Outcome, Tools, find_tools
from phi4.oracles.sandbox import hostile as module


@pytest.fixture
def tools() -> Tools:
    try:
        return find_tools()
    except PlatformError as error:
        pytest.skip(str(error))


def check(capsys: pytest.CaptureFixture) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["sandbox", "check"])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out + printed.err


def test_all_as_expected_is_exit_code_0(tools: Tools, capsys: pytest.CaptureFixture) -> None:
    code, printed = check(capsys)
    assert code == 0, printed
    assert "fork_bomb" in printed
    assert "forged_equality" in printed
    assert "NOT" not in printed


def test_one_that_gets_through_is_exit_code_1(
    tools: Tools, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = Ended(Outcome.FINISHED, exit_status=0, stdout=b"core_pattern")
    held = Ended(Outcome.FINISHED, exit_status=0, stdout=b"refused")
    monkeypatch.setattr(
        sandbox,
        "run_attack",
        lambda attack, tools: got if attack.name == "kernel_settings" else held,
    )
    monkeypatch.setattr(sandbox, "attacks", lambda machine: [module.ATTACKS[0], settings()])
    code, printed = check(capsys)
    assert code == 1
    assert printed.count("NOT") == 1
    assert "1 of" in printed


def settings() -> module.Attack:
    return next(attack for attack in module.ATTACKS if attack.name == "kernel_settings")


@pytest.mark.parametrize("reason", ["bwrap: Creating new namespace failed", "no seccomp"])
def test_sandbox_that_cannot_start_is_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(sandbox, "find_tools", lambda: Tools("/no/bwrap", "0", None, "x86_64"))
    ended = Ended(Outcome.NOT_STARTED, reason)
    monkeypatch.setattr(sandbox, "run", lambda task, limits, tools: ended)
    code, printed = check(capsys)
    assert code == 2
    assert printed.startswith(f"PlatformError: the sandbox cannot start here: {reason}")
    assert printed.count("\n") == 1


def test_missing_bubblewrap_is_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4.oracles.sandbox.tools.shutil.which", lambda name, path: None)
    code, printed = check(capsys)
    assert (code, printed.count("\n")) == (2, 1)
    assert "apt-get install bubblewrap" in printed
