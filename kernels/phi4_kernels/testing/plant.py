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
def planted(op: str, *texts: str) -> Iterator[None]:
    """Run `op`'s Triton implementation with texts replaced: old, new, old, new, ..."""
    source = (registry.folder(op) / "triton_impl.py").read_text()
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        if old not in source:
            raise ValueError(f"{op}/triton_impl.py has no {old!r} to replace")
        source = source.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"planted_{op}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        genuine = registry.implementation

        def implementation(asked: str, name: str) -> ModuleType:
            return module if (asked, name) == (op, "triton") else genuine(asked, name)

        with mock.patch.object(registry, "implementation", implementation):
            yield
