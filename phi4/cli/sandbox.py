"""`phi4 sandbox`: does the sandbox of this machine hold?"""

import typer
from rich.table import Table

from phi4.cli.tables import table_console
from phi4.errors import PlatformError
from phi4.oracles.code import CodeOracle
from phi4.oracles.code.forgeries import FORGERIES, HONEST, KEY
from phi4.oracles.sandbox import Limits, Outcome, Task, Tools, find_tools, run
from phi4.oracles.sandbox.hostile import attacks, is_held, run_attack, told
from phi4.oracles.verdict import Grade, ToGrade

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command()
def check() -> None:
    """Run hostile programs in the sandbox of this machine and show the outcome of each.

    Works for root and for any other user. Exit code 0 if all were contained, 1 if one was not, 2 if
    the sandbox cannot start on this machine.
    """
    tools = find_tools()
    _start(tools)
    table = Table(title=f"bubblewrap {tools.bwrap_version}, {tools.machine}")
    for column in ("program", "expected", "got", ""):
        table.add_column(column, overflow="fold")
    held = []
    for name, expected, got, is_as_expected in [*_attacks(tools), *_forgeries(tools)]:
        held.append(is_as_expected)
        table.add_row(name, expected, got, "ok" if is_as_expected else "NOT")
    table_console().print(table)
    if not all(held):
        print(f"{held.count(False)} of {len(held)} not as expected: run no program of a model here")
    raise SystemExit(int(not all(held)))


def _start(tools: Tools) -> None:
    """The least that the sandbox has to do.

    Raises:
        PlatformError: it cannot start.
    """
    ended = run(Task(("/usr/bin/true",)), Limits(), tools)
    if ended.outcome is not Outcome.FINISHED:
        raise PlatformError(
            f"the sandbox cannot start here: {ended.reason}; it needs user namespaces, which the "
            "kernel (user.max_user_namespaces, kernel.unprivileged_userns_clone, AppArmor) or a "
            "container around it may refuse"
        )


def _attacks(tools: Tools) -> list[tuple[str, str, str, bool]]:
    rows = []
    for attack in attacks(tools.machine):
        ended = run_attack(attack, tools)
        rows.append((attack.name, attack.expected, told(ended), is_held(attack, ended)))
    return rows


def _forgeries(tools: Tools) -> list[tuple[str, str, str, bool]]:
    answers = {"honest": HONEST} | dict(FORGERIES)
    oracle = CodeOracle(num_workers=1, tools=tools)
    graded = oracle.grade([ToGrade(source, dict(KEY)) for source in answers.values()])
    rows = []
    for name, one in zip(answers, graded, strict=True):
        expected = Grade.RIGHT if name == "honest" else Grade.WRONG
        got = f"{one.outcome}: {one.reason}" if one.reason else str(one.outcome)
        rows.append((name, str(expected), got, one.outcome is expected))
    return rows
