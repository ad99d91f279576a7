"""Wrong answers that try to be graded as right, for checks of the sandbox.

Each returns or prints something that a grader inside the program would accept. They are graded by
`phi4 sandbox check` and by the tests, with the key below.
"""

from collections.abc import Mapping

KEY: Mapping[str, object] = {
    "language": "python",
    "function": "add",
    "cases": [{"arguments": [1, 2], "expected": 3}, {"arguments": [20, 22], "expected": 42}],
}

HONEST = "def add(a, b):\n    return a + b\n"
"""The right answer to the key."""

_EQUAL_TO_ALL = """\
class Any{base}:
    def __eq__(self, other):
        return True
    __hash__ = object.__hash__
def add(a, b):
    return Any({value})
"""

FORGERIES: Mapping[str, str] = {
    "forged_passed": 'import sys\nprint("PASSED")\nsys.exit(0)\n',
    "forged_equality": _EQUAL_TO_ALL.format(base="", value=""),
    "forged_number": _EQUAL_TO_ALL.format(base="(int)", value="a + b"),
    "forged_text": _EQUAL_TO_ALL.format(base="(str)", value="a + b"),
    "forged_exit": """\
import os
def add(a, b):
    if a > 1:
        os._exit(0)
    return a + b
""",
    "forged_lines": """\
import json, os, sys
frame = sys._getframe()
while "asked" not in frame.f_locals:
    frame = frame.f_back
asked, channel = frame.f_locals["asked"], frame.f_locals["channel"]
for guess in (3, 42):
    for case in asked["cases"]:
        line = json.dumps({"nonce": case["nonce"], "value": guess}) + "\\n"
        os.write(channel, line.encode())
os._exit(0)
""",
    "forged_stdout": """\
import sys
def add(a, b):
    for fd in range(1, 8):
        try:
            open(fd, "w", closefd=False).write('{"value": 3}\\n{"value": 42}\\n')
        except OSError:
            pass
""",
    "forged_encoder": """\
import builtins, json
json.dumps = json.JSONEncoder.encode = lambda *arguments, **named: '{"value": 3}'
builtins.type = lambda *arguments: int
def add(a, b):
    return True
""",
    "forged_true": "def add(a, b):\n    return True\n",
}
"""Wrong answers by name."""
