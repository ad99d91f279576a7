"""Plants a mistake in a copy of a kernel file: a gate that stays green on it is no gate."""

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from phi4_kernels import registry


@contextmanager
def planted(op: str, old: str, new: str) -> Iterator[None]:
    """Run `op`'s Triton implementation with every `old` in its source replaced by `new`."""
    source = (registry.folder(op) / "triton_impl.py").read_text()
    if old not in source:
        raise ValueError(f"{op}/triton_impl.py has no {old!r} to replace")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"planted_{op}.py"
        file.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        genuine = registry.implementation

        def implementation(asked: str, name: str) -> ModuleType:
            return module if (asked, name) == (op, "triton") else genuine(asked, name)

        with mock.patch.object(registry, "implementation", implementation):
            yield
