"""Mutants of an op, each a changed text in one of its files, which the checks must detect.

A kernel is compiled, or interpreted, from the text of its file. Files of an implementation
(`triton_*.py`, `gluon_*.py`) are therefore imported again, all of them together, with the changed
one in place of the shipped one. The other files (`op.py`, `linear.py`, `torch_impl.py`, ...) hold
plain functions, which callers have imported by name and which are registered with torch only once:
there the code objects of the existing functions are replaced.
"""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest import mock

from phi4_kernels import registry


@contextmanager
def mutant(op: str, file: str, *texts: str) -> Iterator[None]:
    """Run `op` with texts of one of its files replaced.

    Args:
        op: the op's folder.
        file: name of a file in it, with its suffix.
        texts: old, new, old, new, ...; every occurrence of an old text is replaced.

    Raises:
        ValueError: an old text does not occur, or the change is outside of all functions of a
            file whose functions are changed in place.
    """
    source = shipped = (registry.folder(op) / file).read_text()
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        if old not in source:
            raise ValueError(f"{op}/{file} has no {old!r} to replace")
        source = source.replace(old, new)
    name = file.partition("_")[0]
    # Kernels are compiled from the text of their file: it has to be another file.
    if name != "torch" and name in registry.implementations(op):
        change = _imported_again(op, name, file, source)
    else:
        change = _in_place(f"phi4_kernels.{op}.{file.removesuffix('.py')}", shipped, source)
    with change:
        yield


@contextmanager
def _imported_again(op: str, name: str, file: str, source: str) -> Iterator[None]:
    """All files of implementation `name` imported again, `file` with the given source."""
    package = importlib.import_module(f"phi4_kernels.{op}")
    stems = [path.stem for path in registry.folder(op).glob(f"{name}_*.py")]
    genuine = registry.implementation
    genuine(op, name)
    shipped = _forgotten(package, stems)
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / file).write_text(source)
            importlib.invalidate_caches()
            with mock.patch.object(package, "__path__", [folder, *package.__path__]):
                module = importlib.import_module(f"{package.__name__}.{name}_impl")

            def implementation(asked: str, which: str) -> ModuleType:
                return module if (asked, which) == (op, name) else genuine(asked, which)

            with mock.patch.object(registry, "implementation", implementation):
                yield
    finally:
        _forgotten(package, stems)
        for stem, module in shipped.items():
            sys.modules[module.__name__] = module
            setattr(package, stem, module)


def _forgotten(package: ModuleType, stems: list[str]) -> dict[str, ModuleType]:
    """Submodules of the package that are imported, which the next import will not find."""
    for stem in stems:
        vars(package).pop(stem, None)
    found = {stem: sys.modules.pop(f"{package.__name__}.{stem}", None) for stem in stems}
    return {stem: module for stem, module in found.items() if module is not None}


@contextmanager
def _in_place(module: str, shipped: str, source: str) -> Iterator[None]:
    """Functions of `module` run the code of `source` where it differs from the shipped one."""
    before, after = (_codes(compile(text, module, "exec")) for text in (shipped, source))
    functions = _functions(importlib.import_module(module))
    changed = {
        function: after[name]
        for name, function in functions.items()
        if name in after and _without_lines(before[name]) != _without_lines(after[name])
    }
    if not changed:
        raise ValueError(f"no function of {module} is changed; expected a text inside of one")
    genuine = {function: function.__code__ for function in changed}
    try:
        for function, code in changed.items():
            function.__code__ = code
        yield
    finally:
        for function, code in genuine.items():
            function.__code__ = code


def _codes(code: CodeType) -> dict[str, CodeType]:
    """Code of the functions and methods in a module's code, by qualified name."""
    found: dict[str, CodeType] = {}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= {constant.co_qualname: constant} | _codes(constant)
    return found


def _without_lines(code: CodeType) -> CodeType:
    """The code without its line numbers: a mutant may have a line more or less."""
    constants = (_without_lines(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_firstlineno=1, co_linetable=b"", co_consts=tuple(constants))


def _functions(owner: Any) -> dict[str, FunctionType]:
    """Functions that a module or class defines, by qualified name, under their decorators."""
    module = getattr(owner, "__module__", owner.__name__)
    found: dict[str, FunctionType] = {}
    for value in vars(owner).values():
        if isinstance(value, type) and value.__module__ == module:
            found |= _functions(value)
            continue
        value = getattr(value, "fget", value)
        value = getattr(value, "__func__", value)
        value = getattr(value, "__wrapped__", value)
        if isinstance(value, FunctionType) and value.__module__ == module:
            found[value.__qualname__] = value
    return found
