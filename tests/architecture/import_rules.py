"""Who may import whom, read from the syntax trees: nothing is imported to be checked."""

import ast
import sys
from collections.abc import Callable, Iterator, Sequence

from tests.architecture.import_graph import Source, package_of
from tests.architecture.sub_layers import Layers, depth_in, sub_layer_violations

LAYERS: Layers = (
    ("__main__",),
    ("cli",),
    ("serve", "evaluate", "pts", "synth", "verify"),
    ("launch",),
    ("sampling",),
    ("plan",),
    ("stages", "convert"),
    ("train",),
    ("engine",),
    ("track", "writer"),
    ("rundir",),
    ("data", "model"),
    ("config", "oracles"),
    ("errors", "imports"),
)
"""Packages of phi4/, top to bottom. A package imports packages of lower layers only."""

KERNEL_USERS = ("engine", "verify", "cli")
"""Packages that may import phi4_kernels."""

SAMPLER_USERS = ("serve", "evaluate", "pts", "synth")
"""Packages that reach a model through sampling, never through the engine."""

_FLASH = "kernels/phi4_kernels/attention/flash_impl.py"
ONLY_IN = {
    "megatron": "phi4/engine/",
    "transformer_engine": "phi4/engine/",
    "mlflow": "phi4/track/mlflow/",
    "transformers": "phi4/convert/",
    "fastapi": "phi4/serve/",
    "starlette": "phi4/serve/",
    "uvicorn": "phi4/serve/",
    "prometheus_client": "phi4/serve/",
    "flash_attn": _FLASH,
    "flash_attn_interface": _FLASH,
}
"""Third parties that one place owns; those of the kernels are imported inside a function only."""

KERNEL_PACKAGES = {"phi4_kernels", "torch", "triton", "numpy"} | set(sys.stdlib_module_names)
KERNEL_PROVIDERS = (
    "kernels/phi4_kernels/bench/providers/",
    "kernels/phi4_kernels/bench/roofline.py",
)
"""Competitors in the bench and its picture: any third party, but imported when asked for only."""

RANK_FREE = (
    *("phi4/data/", "phi4/rundir/", "phi4/track/", "phi4/writer/"),
    *("phi4/model/", "phi4/oracles/"),
)
"""Packages that are handed plain values and know no process group."""

TORCH_FREE = ("phi4/rundir/", "phi4/launch/", "phi4/oracles/")
"""Packages that start in milliseconds, so without torch."""

ENVIRONMENT_READERS = (
    "phi4/launch/",
    "phi4/engine/platform.py",
    "phi4/cli/asked_model.py",
    "phi4/cli/serve.py",
    "phi4/data/vocabulary/tokenizer.py",
    "kernels/phi4_kernels/dispatch.py",
    "kernels/phi4_kernels/testing/",
)
_ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "putenv", "unsetenv"}


def violations(sources: Sequence[Source]) -> list[str]:
    """Every broken rule as `path:line: what`; empty for a sound tree."""
    broken = [
        f"{source.path}:{line}: {text}"
        for source in sources
        for rule in RULES
        for line, text in rule(source)
    ]
    # An import of two names breaks a rule once.
    return list(dict.fromkeys([*broken, *sub_layer_violations(sources)]))


def layers(source: Source) -> Iterator[tuple[int, str]]:
    """A package of phi4 imports lower layers only."""
    if source.module.split(".")[0] != "phi4":
        return
    depth = depth_in(LAYERS, source.package)
    if depth is None and source.package:
        yield 1, f"package {source.package!r} has no layer; give it one in LAYERS"
        return
    for found in source.imports:
        # `from phi4 import __version__` is no package.
        package = package_of(found.module)
        if found.module.split(".")[0] != "phi4" or package in ("", "__version__", source.package):
            continue
        below = depth_in(LAYERS, package)
        who = source.package or "phi4"
        if below is None:
            yield found.line, f"imports {found.module}, a package without a layer"
        elif depth is None or below <= depth:
            yield found.line, f"{who} may not import {package}: not a lower layer"


def sampler_users(source: Source) -> Iterator[tuple[int, str]]:
    """What samples runs on any model, so it knows the Sampler and not the engine."""
    if source.path.startswith("phi4/") and source.package in SAMPLER_USERS:
        for found in source.imports:
            if f"{found.module}.".startswith("phi4.engine."):
                yield found.line, f"{source.package} may not import engine: use sampling.Sampler"


def kernel_users(source: Source) -> Iterator[tuple[int, str]]:
    """Only the engine, the proofs and the command line import phi4_kernels."""
    if source.path.startswith("phi4/") and source.package not in KERNEL_USERS:
        for found in source.imports:
            if found.module.split(".")[0] == "phi4_kernels":
                yield found.line, f"{source.package} may not import phi4_kernels"


def kernels_stand_alone(source: Source) -> Iterator[tuple[int, str]]:
    """phi4_kernels imports torch, triton, numpy, the standard library, and lazily what it owns."""
    if not source.path.startswith("kernels/"):
        return
    provider = source.path.startswith(KERNEL_PROVIDERS)
    for found in source.imports:
        package = found.module.split(".")[0]
        if package in KERNEL_PACKAGES:
            continue
        owner = ONLY_IN.get(package) == source.path
        if package == "phi4" or not (provider or owner):
            yield found.line, f"phi4_kernels may not import {package}"
        elif not found.lazy:
            who = "a bench provider" if provider else "an implementation"
            yield found.line, f"{who} imports {package} inside a function only"


def owned_packages(source: Source) -> Iterator[tuple[int, str]]:
    """Some third parties have one owner."""
    if not source.path.startswith("phi4/"):
        return
    for found in source.imports:
        owner = ONLY_IN.get(found.module.split(".")[0])
        if owner and not source.path.startswith(owner):
            yield found.line, f"{found.module.split('.')[0]} is imported in {owner} only"


def rank_free_packages(source: Source) -> Iterator[tuple[int, str]]:
    """Some packages know no ranks, and no triton_impl.py communicates."""
    triton = source.path.endswith("/triton_impl.py")
    if not triton and not source.path.startswith(RANK_FREE):
        return
    who = "triton_impl.py" if triton else source.package
    for found in source.imports:
        if found.module.startswith("torch.distributed"):
            yield found.line, f"{who} may not use torch.distributed"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, f"{who} may not use torch.distributed"


def torch_free_packages(source: Source) -> Iterator[tuple[int, str]]:
    """What starts in milliseconds does not import torch."""
    if source.path.startswith(TORCH_FREE):
        for found in source.imports:
            if found.module.split(".")[0] == "torch":
                yield found.line, f"{source.package} may not import torch"


def environment(source: Source) -> Iterator[tuple[int, str]]:
    """os.environ has few readers."""
    if source.path.startswith(ENVIRONMENT_READERS):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in _ENVIRONMENT_NAMES:
            if isinstance(node.value, ast.Name) and node.value.id == "os":
                yield node.lineno, f"os.{node.attr} is read in a few files only"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for name in sorted({alias.name for alias in node.names} & _ENVIRONMENT_NAMES):
                yield node.lineno, f"os.{name} is read in a few files only"


Rule = Callable[[Source], Iterator[tuple[int, str]]]
RULES: tuple[Rule, ...] = (
    layers,
    sampler_users,
    kernel_users,
    kernels_stand_alone,
    owned_packages,
    rank_free_packages,
    torch_free_packages,
    environment,
)
