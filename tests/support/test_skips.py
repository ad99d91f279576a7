"""The strict skip list, run on small test files of its own."""

from pathlib import Path

import pytest

from tests.support.skips import AllowedSkip, StrictSkips, read_skip_list

pytest_plugins = ["pytester"]

SKIPPING = """
import pytest

def test_listed(): pytest.skip("no ranks here")
def test_unlisted(): pytest.skip("nobody knows why")
@pytest.mark.skipif(True, reason="no ranks here")
def test_listed_mark(): ...
@pytest.mark.xfail(reason="broken")
def test_expected(): assert False
def test_plain(): ...
"""


def run(pytester: pytest.Pytester, *allowed: AllowedSkip) -> dict[str, int]:
    plugins = [StrictSkips(allowed)]
    return pytester.inline_run("-p", "no:cacheprovider", plugins=plugins).countoutcomes()


def test_unlisted_skips_and_expected_failures_fail(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_one=SKIPPING)
    # passed, skipped, failed
    assert run(pytester, AllowedSkip("test_one.py::*", "*no ranks*")) == [1, 2, 2]


def test_listed_expected_failure_stays_one(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_one=SKIPPING)
    assert run(pytester, AllowedSkip("*", "*")) == [1, 4, 0]


def test_the_node_id_must_match_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_one=SKIPPING)
    assert run(pytester, AllowedSkip("test_two.py::*", "*")) == [1, 0, 4]


def test_module_that_skips_itself_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_one="import pytest\npytest.importorskip('no_such_package')")
    allowed = AllowedSkip("test_two.py", "*")
    plugins = [StrictSkips((allowed,))]
    result = pytester.inline_run("-p", "no:cacheprovider", plugins=plugins)
    assert result.ret != pytest.ExitCode.OK
    assert result.getfailedcollections()


def test_list_reads_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "skips.txt"
    path.write_text("# why\n\ntests/a/* | no *\n", encoding="utf-8")
    assert read_skip_list(path) == (AllowedSkip("tests/a/*", "no *"),)


@pytest.mark.parametrize("line", ["tests/a/*", "tests/a/* |", "| reason"])
def test_list_refuses_half_a_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "skips.txt"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"skips\.txt:1"):
        read_skip_list(path)
