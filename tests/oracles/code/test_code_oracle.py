"""Programs in answers: what they compute decides, and nothing that they say of it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from phi4.oracles.code import CodeOracle
from phi4.oracles.code.forgeries import FORGERIES, HONEST, KEY
from phi4.oracles.sandbox import Tools
from phi4.oracles.sandbox.languages import LANGUAGES, find_toolchain
from phi4.oracles.verdict import Grade, Graded, ToGrade
from tests.support.waiting import LONG_SECONDS

NESTED = [1, "ä", None, {"k": [2.5, True]}]
RIGHT, WRONG, UNGRADABLE = Grade.RIGHT, Grade.WRONG, Grade.UNGRADABLE


@pytest.fixture(scope="module")
def oracle(tools: Tools) -> Iterator[CodeOracle]:
    opened = CodeOracle(num_workers=2, tools=tools)
    yield opened
    opened.close()


def graded(oracle: CodeOracle, answer: str, key: object) -> Graded:
    [one] = oracle.grade([ToGrade(answer, key)])
    return one


def function(*cases: tuple[list, object], **rest: object) -> dict[str, object]:
    rows = [{"arguments": arguments, "expected": expected} for arguments, expected in cases]
    return {"language": "python", "function": "f", "cases": rows, **rest}


def program(language: str, *cases: tuple[str, str], **rest: object) -> dict[str, object]:
    rows = [{"stdin": stdin, "expected": expected} for stdin, expected in cases]
    return {"language": language, "cases": rows, **rest}


def test_function_is_right_by_its_values(oracle: CodeOracle, tools: Tools) -> None:
    answers = [HONEST, "def add(a, b): return 3", f"Thus:\n```python\n{HONEST}```\nDone."]
    seen = oracle.grade([ToGrade(answer, dict(KEY)) for answer in answers])
    assert [one.outcome for one in seen] == [RIGHT, WRONG, RIGHT]
    assert seen[0].versions["bwrap"] == tools.bwrap_version
    assert seen[0].versions["python"].startswith("Python 3.")


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_is_wrong(oracle: CodeOracle, name: str) -> None:
    one = graded(oracle, FORGERIES[name], dict(KEY))
    assert one.outcome is WRONG, one


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(x): raise ValueError", "raised ValueError"),
        ("def f(x): exit()", "raised SystemExit"),
        ("def f(x): return {1}", "no plain value, but set"),
        ("def f(x): return float('nan')", "no plain value, but float"),
        ("def f(x):\n    x.append(x)\n    return x", "no plain value, but list"),
        ("def g(x): return 1", "KeyError while it was loaded"),
        ("def f(x) return 1", "SyntaxError while it was loaded"),
        ("import os\nos.kill(os.getpid(), 11)", "SIGSEGV"),
        ("def f(x):\n    while True: pass", "0.2 s of processor time"),
        ("import os\nos.write(3, b'x')\ndef f(x): return [1]", "no value"),
        ("import sys\nsys.setrecursionlimit(10**8)\ndef f(x): return f(x)", ""),
    ],
)
def test_program_that_fails_is_wrong_with_the_reason(
    oracle: CodeOracle, source: str, reason: str
) -> None:
    one = graded(oracle, source, function(([[]], [1]), cpu_seconds=0.2))
    assert one.outcome is WRONG
    assert reason in one.reason


def test_values_are_compared_as_json(oracle: CodeOracle) -> None:
    source = "def f(x): return x"
    huge = "def f(x): return 10 ** 5000"
    for answer, key, outcome in [
        (source, function(([NESTED], NESTED)), RIGHT),
        (source, function(([1], 1.0)), RIGHT),
        (source, function(([True], 1)), WRONG),
        (source, function(([1.0000001], 1)), WRONG),
        (source, function(([1.0000001], 1), tolerance=1e-6), RIGHT),
        ("def f(x): return (1, 2)", function(([0], [1, 2])), RIGHT),
        # Both processes go on with the cases; one of them is heard.
        ("import os\nos.fork()\n" + source, function(([7], 7), ([8], 8)), RIGHT),
        (huge, function(([0], 1)), WRONG),
    ]:
        assert graded(oracle, answer, key).outcome is outcome, key


def test_expected_value_never_enters_the_sandbox(
    oracle: CodeOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi4.oracles.code import function_run, program_run

    given = []

    def watch(module: object) -> None:
        run = module.run

        def watched(task: object, *rest: object) -> object:
            given.append(repr(task))
            return run(task, *rest)

        monkeypatch.setattr(module, "run", watched)

    watch(function_run)
    watch(program_run)
    assert graded(oracle, "def f(x): return x * 3", function(([41], 123))).outcome is RIGHT
    answer = "print(int(input()) * 3)"
    assert graded(oracle, answer, program("python", ("41", "123"))).outcome is RIGHT
    assert len(given) == 2
    assert all("41" in one and "123" not in one for one in given)


def test_program_is_right_by_its_output_and_status(oracle: CodeOracle) -> None:
    for answer, key, outcome in [
        ("print(input()[::-1], ' ')\nexit()", program("python", ("ab", "ba")), RIGHT),
        ("print(input())", program("python", ("a", "a\n\n"), ("b", "c")), WRONG),
        # An exception with an empty output expected: the output is right, the program is not.
        ("raise ValueError", program("python", ("", "")), WRONG),
        ("", program("python", ("", "")), RIGHT),
        ("print(0.1 + 0.2)", program("python", ("", "0.3")), WRONG),
        ("print(0.1 + 0.2)", program("python", ("", "0.3"), tolerance=1e-9), RIGHT),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", program("python", ("", "")), WRONG),
    ]:
        one = graded(oracle, answer, key)
        assert one.outcome is outcome, (answer, one)


SUMS = {
    "cpp": "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }",
    "js": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);"
    "console.log(a + b)",
    "java": "import java.util.*;\npublic class Sum { public static void main(String[] words) {"
    "Scanner in = new Scanner(System.in); System.out.println(in.nextInt() + in.nextInt()); } }",
    "rust": "use std::io::*; fn main() { let mut s = String::new();"
    "stdin().read_to_string(&mut s).unwrap();"
    'println!("{}", s.split_whitespace().map(|w| w.parse::<i64>().unwrap()).sum::<i64>()); }',
    "go": 'package main\nimport "fmt"\nfunc main() { var a, b int; fmt.Scan(&a, &b);'
    "fmt.Println(a + b) }",
    "python": "print(sum(map(int, input().split())))",
}


def graded_sum(oracle: CodeOracle, language: str) -> Graded:
    answer = f"```{LANGUAGES[language].labels[0]}\n{SUMS[language]}\n```"
    key = program(language, ("2 3", "5"), ("20 22", "42"))
    return graded(oracle, answer, key)


@pytest.mark.parametrize("language", ["cpp", "js", "rust"])
def test_program_of_a_language_runs_or_says_what_is_missing(
    oracle: CodeOracle, language: str
) -> None:
    one = graded_sum(oracle, language)
    try:
        find_toolchain(language)
    except Exception as error:
        assert (one.outcome, one.reason) == (UNGRADABLE, f"no {language}: {error}")
    else:
        assert one.outcome is RIGHT, one
        assert set(one.versions) == {"bwrap", language}


@pytest.mark.slow
@pytest.mark.parametrize("language", SUMS)
def test_every_language_runs_or_says_what_is_missing(oracle: CodeOracle, language: str) -> None:
    test_program_of_a_language_runs_or_says_what_is_missing(oracle, language)


def test_program_that_does_not_compile_is_wrong(oracle: CodeOracle) -> None:
    one = graded(oracle, "int main( {}", program("cpp", ("", "")))
    if "no cpp" not in one.reason:
        assert (one.outcome, "error" in one.reason) == (WRONG, True)


def test_compiler_that_the_sandbox_cannot_see_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "rustc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Exception, match=f"rustc is only at {compiler}.*below /usr"):
        find_toolchain("rust", search_path=str(tmp_path / "none"))
    with pytest.raises(Exception, match="not visible in the sandbox"):
        find_toolchain("rust", search_path=str(tmp_path))
    with pytest.raises(Exception, match="go is not installed"):
        find_toolchain("go", search_path=str(tmp_path))


def test_broken_sandbox_is_no_verdict(tools: Tools) -> None:
    oracle = CodeOracle(num_workers=1, tools=replace(tools, bwrap="/no/bwrap", setpriv=None))
    for key in (dict(KEY), program("python", ("", ""))):
        one = graded(oracle, HONEST, key)
        assert one.outcome is UNGRADABLE
        assert "could not start" in one.reason


def test_interpreter_that_fails_before_the_answer_is_no_verdict(
    oracle: CodeOracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi4.oracles.code import function_run

    broken = tmp_path / "harness.py"
    broken.write_text("import no_such_module")
    monkeypatch.setattr(function_run, "_HARNESS", broken)
    assert graded(oracle, HONEST, dict(KEY)).outcome is UNGRADABLE


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("print(1)", "expected a table"),
        ({"language": "perl", "cases": [{}]}, "language is 'perl'"),
        ({"language": "cpp", "function": "f", "cases": [{}]}, "only python functions"),
        ({"language": "python", "cases": []}, "at least one"),
        ({"language": "python", "cases": [{"stdin": ""}]}, "stdin and expected"),
        ({"language": "python", "cases": [{"stdin": "", "expected": 5}]}, "expected a string"),
        ({"language": "python", "cases": [{}], "tolerence": 1}, "'tolerence'"),
        (function(([1], float("nan"))), "not JSON"),
        (function(([1], 1), tolerance=True), "tolerance is True"),
        (function(([1], 1), cpu_seconds=0), "cpu_seconds is 0"),
        (function(([{1}], 1)), "not JSON"),
        (function((1, 1)), "expected a list"),
        (function(([1], 1)) | {"function": "f;g"}, "expected a name"),
    ],
)
def test_key_that_is_not_understood_grades_nothing(
    oracle: CodeOracle, key: object, reason: str
) -> None:
    one = graded(oracle, HONEST, key)
    assert one.outcome is UNGRADABLE
    assert reason in one.reason


UNDER_LOAD = """
import json, sys
from phi4.oracles.code import CodeOracle
from phi4.oracles.verdict import ToGrade
key = {"language": "python", "function": "f", "cpu_seconds": 0.2,
       "cases": [{"arguments": [n], "expected": n + 1} for n in range(3)]}
answers = ["def f(x): return x", "import os\\ndef f(x):\\n    os.fork()\\n    while True: pass",
           "def f(x):\\n    return x + 1 if sum(range(10 ** 5)) else 0"]
oracle = CodeOracle(num_workers=2)
print(json.dumps([str(one.outcome) for one in oracle.grade([ToGrade(a, key) for a in answers])]))
"""


@pytest.mark.slow
def test_verdicts_are_the_same_at_nice_19_beside_busy_loops(tools: Tools) -> None:
    def verdicts(*prefix: str) -> list[str]:
        code = f"import sys; sys.path[:] = {sys.path!r}\n{UNDER_LOAD}"
        command = [*prefix, sys.executable, "-c", code]
        return json.loads(subprocess.check_output(command, timeout=LONG_SECONDS))

    alone = verdicts()
    assert alone == ["wrong", "wrong", "right"]
    loops = [subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"]) for _ in range(4)]
    try:
        assert verdicts("nice", "-n", "19") == alone
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
