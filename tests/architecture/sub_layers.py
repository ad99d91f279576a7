"""Who may import whom within a package: its parts have layers, as the packages of phi4/ have.

A part is a sub-package or a file of the package, or a deeper file that has a layer of its own.
"""

from collections.abc import Iterator, Mapping, Sequence

from tests.architecture.import_graph import Source, cycles, resolve

Layers = tuple[tuple[str, ...], ...]

SUB_LAYERS: Mapping[str, Layers] = {
    "phi4.data": (
        ("screens.decontaminate",),
        ("screens",),
        ("demo",),
        ("tokenize", "stream", "preference"),
        ("files", "rows"),
        ("vocabulary", "permutation"),
    ),
    "phi4.engine": (
        ("checkpoint", "generation"),
        ("engine",),
        ("replay", "fp8_check"),
        ("step", "fake_ranks"),
        ("schedule",),
        ("optimizer", "patches", "step_values"),
        ("optimizer.fp8_gather",),
        ("model", "optimizer.adamw", "checkpoint_io", "checkpoint_capture", "agreement"),
        ("layout", "objective", "platform", "precision", "without_cuda"),
        ("rendezvous", "forward_timer"),
        ("sign_in",),
    ),
    "phi4.oracles": (
        ("registry",),
        ("exact", "choice", "math", "code"),
        ("sandbox",),
        ("verdict",),
    ),
    "phi4_kernels": (
        ("qualification",),
        ("bench",),
        ("adamw",),
        ("*",),
        ("testing",),
        ("testing.gluon",),
        ("dispatch", "operators"),
        ("evidence",),
        ("autograd", "checks", "interpreter", "launch", "reference_arithmetic", "registry"),
        ("cuda_library",),
        ("errors",),
    ),
}
"""Parts, top to bottom. A part imports parts of lower layers only.

`a.b` is a piece of `a` with a layer of its own. `*` is every sub-package that is not named: the
ops, which do not import each other. A file that is not named only has to be free of cycles.
"""


def depth_in(layers: Layers, name: str) -> int | None:
    """Index of the layer that holds a name, 0 at the top; None where no layer does."""
    return next((depth for depth, names in enumerate(layers) if name in names), None)


def sub_layer_violations(sources: Sequence[Source]) -> list[str]:
    """Every import upward or sideways, as `path:line: what`, and every cycle of parts."""
    return [line for package in SUB_LAYERS for line in Parts(package, sources).violations()]


class Parts:
    """The parts of one package and their imports of each other.

    Args:
        package: dotted, a key of SUB_LAYERS.
        sources: all files.
    """

    def __init__(self, package: str, sources: Sequence[Source]) -> None:
        self.package = package
        self.layers = SUB_LAYERS[package]
        self.sources = [source for source in sources if source.module.startswith(f"{package}.")]
        self._modules = {source.module for source in self.sources}
        self._sub_packages = {
            self._names(source.module)[0]: source
            for source in reversed(self.sources)
            if len(self._names(source.module)) > 1 or source.path.endswith("/__init__.py")
        }

    def part_of(self, module: str) -> str:
        """The longest name with a layer that a module lies in, else its first name."""
        names = self._names(module)
        prefixes = [".".join(names[:length]) for length in range(len(names), 0, -1)]
        named = (prefix for prefix in prefixes if depth_in(self.layers, prefix) is not None)
        return next(named, names[0])

    def depth(self, part: str) -> int | None:
        """Layer of a part, 0 at the top; None where it has none."""
        depth = depth_in(self.layers, part)
        if depth is None and part in self._sub_packages:
            return depth_in(self.layers, "*")
        return depth

    def graph(self) -> dict[str, set[str]]:
        """Which part imports which other."""
        graph: dict[str, set[str]] = {self.part_of(module): set() for module in self._modules}
        for _, _, part, other in self._imports():
            graph[part].add(other)
        return graph

    def violations(self) -> Iterator[str]:
        """Sub-packages without a layer, imports that are not downward, and cycles."""
        for name, source in sorted(self._sub_packages.items()):
            if self.depth(name) is None:
                text = f"{self.package}.{name} has no layer; give it one in SUB_LAYERS"
                yield f"{source.path}:1: {text}"
        for source, line, part, other in self._imports():
            above, below = self.depth(part), self.depth(other)
            if above is not None and below is not None and below <= above:
                text = f"{part} may not import {other} of {self.package}: not a lower layer"
                yield f"{source.path}:{line}: {text}"
        for cycle in cycles(self.graph()):
            yield f"parts of {self.package} import each other: {cycle}"

    def _imports(self) -> Iterator[tuple[Source, int, str, str]]:
        """File, line, its part and the other part that it imports."""
        for source in self.sources:
            part = self.part_of(source.module)
            for found in source.imports:
                target = resolve(found.module, self._modules)
                if target and self.part_of(target) != part:
                    yield source, found.line, part, self.part_of(target)

    def _names(self, module: str) -> list[str]:
        return module.removeprefix(f"{self.package}.").split(".")
