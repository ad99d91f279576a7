"""Check the types of phi4 and phi4_kernels with mypy: `make lint` runs it.

tools/type_errors.json has the number of known errors of each file that has some. A file with more
fails, and so does a file with fewer, until the number is lowered: it never rises again unnoticed.

    python -m tools.check_types            compare
    python -m tools.check_types --write    lower the numbers to those of now
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "tools" / "type_errors.json"
COMMAND = (sys.executable, "-m", "mypy", "-p", "phi4", "-p", "phi4_kernels")

_ERROR = re.compile(r"^(\S+?):\d+(?::\d+)?: error: ", re.MULTILINE)
_FOUND_ERRORS = 1
"""mypy's exit code where it checked everything and found errors; 2 where it could not."""


def errors_by_file(output: str) -> Counter[str]:
    """Number of errors of each file in what mypy printed."""
    return Counter(_ERROR.findall(output))


def differences(found: Mapping[str, int], known: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """A line per file with more errors than known, and a line per file with fewer."""
    more, fewer = [], []
    for path in sorted({*found, *known}):
        now, then = found.get(path, 0), known.get(path, 0)
        if now != then:
            line = f"{path}: {now} type errors, {then} known"
            (more if now > then else fewer).append(line)
    return more, fewer


def lowered(found: Mapping[str, int], known: Mapping[str, int]) -> dict[str, int]:
    """The known numbers, none of them above what was found."""
    least = {path: min(count, found.get(path, 0)) for path, count in sorted(known.items())}
    return {path: count for path, count in least.items() if count}


def main() -> int:
    """Run mypy and compare; the exit code is 1 where the numbers differ, 2 where mypy failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="lower the known numbers")
    options = parser.parse_args()
    run = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True)
    if run.returncode not in (0, _FOUND_ERRORS):
        print(f"{run.stdout}{run.stderr}mypy failed with exit code {run.returncode}")
        return 2
    found, known = errors_by_file(run.stdout), json.loads(KNOWN.read_text(encoding="utf-8"))
    if options.write:
        known = lowered(found, known)
        KNOWN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    more, fewer = differences(found, known)
    beyond = {line.partition(":")[0] for line in more}
    for line in run.stdout.splitlines():
        if line.partition(":")[0] in beyond:
            print(line)
    if more:
        print("\n".join([*more, "fix them; an error known to be mypy's: `type: ignore[CODE]`"]))
    if fewer:
        print("\n".join([*fewer, "lower the numbers: python -m tools.check_types --write"]))
    print(f"mypy: {found.total()} errors, {sum(known.values())} known")
    return int(bool(more or fewer))


if __name__ == "__main__":
    sys.exit(main())
