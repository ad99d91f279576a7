"""Grade a program in any language: compile it once, run it per case in a separate sandbox.

A program is right if it ends with status 0 and the expected output; a program that fails is wrong
even if the expected output is empty.
"""

from collections.abc import Mapping
from dataclasses import replace

from phi4.oracles.code.comparing import same_output
from phi4.oracles.code.key import CodeKey
from phi4.oracles.sandbox import Ended, Outcome, Task, Tools, run
from phi4.oracles.sandbox.languages import LANGUAGES, Language, Toolchain
from phi4.oracles.verdict import Grade


def grade_program(
    source: str, key: CodeKey, toolchain: Toolchain, tools: Tools
) -> tuple[Grade, str]:
    """Return verdict and reason for a program in a source text."""
    language = LANGUAGES[key.language]
    name = language.source_name(source)
    files = {name: source.encode("utf-8", errors="replace")}
    files |= {other: text.encode() for other, text in (language.files or {}).items()}
    if language.compile is not None:
        line = _filled(language.compile, dict(toolchain.paths, source=f"/program/{name}"))
        compiled = _compiled(language, line, files, toolchain, tools)
        if isinstance(compiled, tuple):
            return compiled
        files = {"compiled": compiled}
    fill = dict(toolchain.paths, compiled="/program/compiled", main=name.partition(".")[0])
    command = tuple(_filled(word, fill) for word in language.start)
    limits = replace(language.run_limits, cpu_seconds=key.cpu_seconds)
    for number, case in enumerate(key.program_cases, 1):
        stdin = case.stdin.encode("utf-8", errors="surrogatepass")
        within = replace(limits, output_bytes=limits.output_bytes + 4 * len(case.expected))
        ended = run(Task(command, files, stdin, toolchain.read_only), within, tools)
        if failed := _failure(ended, f"case {number}"):
            return failed
        if not same_output(ended.stdout, case.expected, key.tolerance):
            return Grade.WRONG, f"case {number}: unexpected output"
    return Grade.RIGHT, ""


def _compiled(
    language: Language,
    line: str,
    files: Mapping[str, bytes],
    toolchain: Toolchain,
    tools: Tools,
) -> bytes | tuple[Grade, str]:
    """Return the compiled program, or the verdict if compilation failed."""
    task = Task(("/bin/sh", "-c", line), files, read_only=toolchain.read_only)
    ended = run(task, language.compile_limits, tools)
    return _failure(ended, "compiler") or ended.stdout


def _filled(text: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _failure(ended: Ended, who: str) -> tuple[Grade, str] | None:
    if ended.says_nothing:
        return Grade.UNGRADABLE, f"sandbox {ended.outcome}: {ended.reason}"
    if ended.outcome is not Outcome.FINISHED:
        return Grade.WRONG, f"{who}: {ended.outcome}: {ended.reason}"
    if ended.exit_status != 0:
        lines = ended.stderr.decode(errors="replace").strip().split("\n")
        said = next((line for line in lines if "error" in line.lower()), lines[-1])[:200]
        return Grade.WRONG, f"{who}: exit status {ended.exit_status}: {said}"
    return None
