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
        ("tokenize", "stream", "demo"),
        ("files",),
        ("vocabulary", "permutation"),
    ),
    "phi4.engine": (
        ("checkpoint", "generate"),
        ("engine",),
        ("step", "fake_ranks"),
        ("optimizer", "patches"),
        ("model", "optimizer.adamw", "checkpoint_io", "agreement"),
        ("layout", "objective", "platform", "precision"),
        ("rendezvous",),
    ),
    "phi4_kernels": (
        ("bench",),
        ("adamw",),
        ("*",),
        ("testing",),
        ("testing.gluon",),
        ("dispatch", "operators"),
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
    return [line for package in SUB_LAYERS for line in _Package(package, sources).violations()]


class _Package:
    """The parts of one package.

    Args:
        name: dotted, a key of SUB_LAYERS.
        sources: all files.
    """

    def __init__(self, name: str, sources: Sequence[Source]) -> None:
        self.name = name
        self.layers = SUB_LAYERS[name]
        self.modules = {source.module for source in sources}
        self.sources = [source for source in sources if self.holds(source.module)]
        self.sub_packages = {
            self.names(source.module)[0]: source
            for source in reversed(self.sources)
            if len(self.names(source.module)) > 1 or source.path.endswith("/__init__.py")
        }

    def holds(self, module: str) -> bool:
        return module.startswith(self.name + ".")

    def names(self, module: str) -> list[str]:
        return module.removeprefix(self.name + ".").split(".")

    def part(self, module: str) -> str:
        """The longest name with a layer that the module lies in, else its first name."""
        names = self.names(module)
        prefixes = [".".join(names[:length]) for length in range(len(names), 0, -1)]
        named = (prefix for prefix in prefixes if depth_in(self.layers, prefix) is not None)
        return next(named, names[0])

    def depth(self, part: str) -> int | None:
        depth = depth_in(self.layers, part)
        if depth is None and part in self.sub_packages:
            return depth_in(self.layers, "*")
        return depth

    def violations(self) -> Iterator[str]:
        for name, source in sorted(self.sub_packages.items()):
            if self.depth(name) is None:
                yield f"{source.path}:1: {self.name}.{name} has no layer; give it one in SUB_LAYERS"
        graph: dict[str, set[str]] = {self.part(source.module): set() for source in self.sources}
        for source in self.sources:
            part = self.part(source.module)
            above = self.depth(part)
            for found in source.imports:
                target = resolve(found.module, self.modules)
                if target is None or not self.holds(target) or self.part(target) == part:
                    continue
                other = self.part(target)
                graph[part].add(other)
                below = self.depth(other)
                if above is not None and below is not None and below <= above:
                    text = f"{part} may not import {other} of {self.name}: not a lower layer"
                    yield f"{source.path}:{found.line}: {text}"
        yield from (f"parts of {self.name} import each other: {cycle}" for cycle in cycles(graph))
