"""Which program an answer means."""

import pytest

from phi4.oracles.code.fences import program_in

LABELS = ("python", "py")


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nbetter:\n```Python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```\nprints\n```text\n1\n```\n", "x = 1\n"),
        ("```python\nx = 1\n```\nprints\n```\n1\n```\n", "x = 1\n"),
        ("```cpp\nint x;\n```", "int x;\n"),
        ("so\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
        ("````python\n```\n````", "```\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("```python title\nx = 1\n```", "x = 1\n"),
        ("", ""),
    ],
)
def test_last_block_of_the_language(answer: str, program: str) -> None:
    assert program_in(answer, LABELS) == program
