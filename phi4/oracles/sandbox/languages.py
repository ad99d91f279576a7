"""Languages supported by the sandbox: how programs of each are compiled and started.

A compiler is a program like any other, so it runs in a sandbox, and its output is passed to the
next sandbox through memory. Only compilers and interpreters in /usr are used.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from phi4.errors import PlatformError
from phi4.oracles.sandbox.task import Limits

_USER_PATH = "/usr/bin:/usr/local/bin"
PYTHON = ("/usr/bin/python3", "-s", "-S")
"""The system's interpreter, without site-packages. Not -I, which ignores PYTHONHASHSEED as well;
there is no other PYTHON* variable, and no user directory, in the sandbox."""

_MIB = 1 << 20
_COMPILER = Limits(
    cpu_seconds=30.0,
    memory_bytes=1536 * _MIB,
    address_space_bytes=2048 * _MIB,
    num_tasks=32,
    output_bytes=64 * _MIB,
    file_bytes=64 * _MIB,
    tmp_bytes=256 * _MIB,
    num_open_files=256,
)
_PLAIN = Limits()
# These reserve far more address space than they use; resident memory limits them instead.
_RUNTIME = Limits(address_space_bytes=None, num_tasks=64, num_open_files=256)
_RUNTIME_COMPILER = Limits(
    cpu_seconds=60.0,
    memory_bytes=1536 * _MIB,
    address_space_bytes=None,
    num_tasks=64,
    output_bytes=64 * _MIB,
    file_bytes=64 * _MIB,
    tmp_bytes=512 * _MIB,
    num_open_files=1024,
)
_JVM = "-Xmx512m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
_PYTHON_START = """\
import builtins, runpy, sys
builtins.exit = builtins.quit = sys.exit
sys.argv[:] = ["/program/main.py"]
runpy.run_path("/program/main.py", run_name="__main__")
"""
"""`exit` and `quit` come from the module `site`, which -S disables."""


@dataclass(frozen=True)
class Language:
    """How programs of a language are run.

    Attributes:
        labels: names of the language after the fence of a code block.
        source_name: file name of a source text; may depend on the text.
        programs: required executables.
        compile: shell line that writes the compiled program to standard output, with `{program}` of
            `programs` and `{source}` filled in; None for an interpreter.
        start: command of the program, with `{program}` and `{main}` filled in; `{compiled}` is the
            compiled file.
        compile_limits: limits of the compiler.
        run_limits: limits of the program.
        files: additional files for the program.
    """

    labels: tuple[str, ...]
    source_name: Callable[[str], str]
    programs: tuple[str, ...]
    compile: str | None
    start: tuple[str, ...]
    compile_limits: Limits = _COMPILER
    run_limits: Limits = _PLAIN
    files: Mapping[str, str] | None = None


def _java_class(source: str) -> str:
    """Return the class whose `main` is run: the public one, else the one before `main`, else
    Main."""
    if public := re.search(r"\bpublic\s+(?:final\s+|abstract\s+)*class\s+(\w+)", source):
        return public[1]
    before_main = source.partition("static void main")[0]
    return next(reversed(re.findall(r"\bclass\s+(\w+)", before_main)), "Main")


LANGUAGES: Mapping[str, Language] = {
    "python": Language(
        ("python", "py", "python3"),
        lambda source: "main.py",
        ("python3",),
        None,
        (*PYTHON, "/program/start.py"),
        files={"start.py": _PYTHON_START},
    ),
    "cpp": Language(
        ("cpp", "c++", "cc", "cxx"),
        lambda source: "main.cpp",
        ("g++",),
        "{g++} -O2 -std=c++17 -o /tmp/out {source} && cat /tmp/out",
        ("{compiled}",),
    ),
    "rust": Language(
        ("rust", "rs"),
        lambda source: "main.rs",
        ("rustc", "gcc"),
        "{rustc} -O --edition 2021 -C linker={gcc} -o /tmp/out {source} && cat /tmp/out",
        ("{compiled}",),
        compile_limits=_RUNTIME_COMPILER,
    ),
    "go": Language(
        ("go", "golang"),
        lambda source: "main.go",
        ("go",),
        "export GOCACHE=/tmp/cache GOPATH=/tmp/go GO111MODULE=off CGO_ENABLED=0 GOTOOLCHAIN=local; "
        "{go} build -o /tmp/out {source} && cat /tmp/out",
        ("{compiled}",),
        compile_limits=_RUNTIME_COMPILER,
        run_limits=_RUNTIME,
    ),
    "java": Language(
        ("java",),
        lambda source: f"{_java_class(source)}.java",
        ("java", "javac", "jar"),
        "mkdir /tmp/classes && {javac} "
        + " ".join(f"-J{flag}" for flag in _JVM.split())
        + " -proc:none -nowarn -d /tmp/classes {source} >&2 && cd /tmp/classes && "
        "{jar} " + " ".join(f"-J{flag}" for flag in _JVM.split()) + " cf /tmp/out . >&2 && "
        "cat /tmp/out",
        ("{java}", *_JVM.split(), "-cp", "{compiled}", "{main}"),
        compile_limits=_RUNTIME_COMPILER,
        run_limits=_RUNTIME,
    ),
    "js": Language(
        ("js", "javascript", "node", "mjs", "cjs"),
        lambda source: "main.js",
        ("node",),
        None,
        ("{node}", "--max-old-space-size=512", "/program/main.js"),
        run_limits=_RUNTIME,
    ),
}
"""By the name used in keys."""


@dataclass(frozen=True)
class Toolchain:
    """Paths of a language's programs, as seen inside the sandbox.

    Attributes:
        paths: by name.
        read_only: required directories outside /usr.
    """

    paths: Mapping[str, str]
    read_only: tuple[str, ...] = ()


def find_toolchain(language: str, search_path: str = _USER_PATH) -> Toolchain:
    """Find the programs of a language on this machine.

    Raises:
        PlatformError: one is missing, or at a path that is not visible in the sandbox.
    """
    if language == "python":
        # One fixed interpreter: what it can import is part of a verdict.
        search_path = os.path.dirname(PYTHON[0])
    paths = {program: _find(program, search_path) for program in LANGUAGES[language].programs}
    return Toolchain(paths, _settings(paths["java"]) if "java" in paths else ())


def _find(program: str, search_path: str) -> str:
    found = shutil.which(program, path=search_path)
    if found is None:
        other = shutil.which(program)
        where = f"only at {other}, not visible in the sandbox" if other else "not installed"
        raise PlatformError(f"{program} is {where}; install it below /usr")
    # /etc/alternatives, which Debian's links use, is not in the sandbox.
    real = os.path.realpath(found)
    if not real.startswith("/usr/"):
        raise PlatformError(
            f"{found} is {real}, which is not visible in the sandbox; install it in /usr"
        )
    return real


def _settings(java: str) -> tuple[str, ...]:
    """Return directories outside /usr that a Java home links to: Debian keeps its settings in
    /etc."""
    links = (Path(java).parents[1] / "conf").glob("**/*")
    folders = {link.resolve().parent for link in links if link.is_symlink() and link.exists()}
    outside = sorted(str(folder) for folder in folders if not folder.is_relative_to("/usr"))
    # A directory inside another one is included with it.
    return tuple(
        folder for folder in outside if not any(folder.startswith(f"{other}/") for other in outside)
    )
