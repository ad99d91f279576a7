"""Grade a Python function: one sandbox calls it for all cases, the values are compared here.

The expected values never enter the sandbox, so a program that forges its output has to forge the
right value, with one attempt per case.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from phi4.oracles.code.comparing import read_json, same_value
from phi4.oracles.code.key import CodeKey
from phi4.oracles.sandbox import Ended, Limits, Outcome, Task, Tools, run
from phi4.oracles.sandbox.languages import PYTHON
from phi4.oracles.verdict import Grade

_HARNESS = Path(__file__).with_name("function_harness.py")


def grade_function(source: str, key: CodeKey, tools: Tools) -> tuple[Grade, str]:
    """Return verdict and reason for a function in a source text."""
    nonces = [secrets.token_hex(8) for _ in range(len(key.cases) + 1)]
    asked = {
        "nonce": nonces[0],
        "function": key.function,
        "cases": [
            {"nonce": nonce, "arguments": case.arguments}
            for nonce, case in zip(nonces[1:], key.function_cases, strict=True)
        ],
    }
    expected_bytes = len(json.dumps([case.expected for case in key.function_cases]))
    files = {
        "harness.py": _HARNESS.read_bytes(),
        "solution.py": source.encode("utf-8", errors="replace"),
    }
    limits = replace(
        Limits(),
        cpu_seconds=key.cpu_seconds,
        output_bytes=Limits.output_bytes + 4 * expected_bytes,
    )
    task = Task((*PYTHON, "/program/harness.py"), files, json.dumps(asked).encode())
    ended = run(task, limits, tools)
    return _verdict(ended, nonces, key)


def _verdict(ended: Ended, nonces: Sequence[str], key: CodeKey) -> tuple[Grade, str]:
    if ended.says_nothing:
        return Grade.UNGRADABLE, f"sandbox {ended.outcome}: {ended.reason}"
    lines = ended.stdout.split(b"\n")
    if _said(lines[0], nonces[0]) is None:
        last = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        return Grade.UNGRADABLE, f"python did not reach the answer ({ended.outcome}): {last}"
    if ended.outcome is not Outcome.FINISHED:
        return Grade.WRONG, f"{ended.outcome}: {ended.reason}"
    for number, (nonce, case) in enumerate(zip(nonces[1:], key.function_cases, strict=True), 1):
        said = _said(lines[number], nonce) if number < len(lines) else None
        if said is None:
            loading = _said(lines[1], nonces[0]) if len(lines) > 1 else None
            problem = loading and loading.get("problem")
            return Grade.WRONG, str(problem or f"case {number}: no value, the program exited")
        if "value" not in said:
            return Grade.WRONG, f"case {number}: {said.get('problem')}"
        if not same_value(said["value"], case.expected, key.tolerance):
            return Grade.WRONG, f"case {number}: unexpected value"
    if lines[len(nonces) :] != [b""] or ended.exit_status != 0:
        return Grade.WRONG, "unexpected data was written to the result channel"
    return Grade.RIGHT, ""


def _said(line: bytes, nonce: str) -> dict | None:
    """Parse a line of the harness for one nonce; None if it is invalid."""
    try:
        said = read_json(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) and said.get("nonce") == nonce else None
