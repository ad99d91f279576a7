"""Mutated checkpoints, loaded: each ends in one line or loads, and none of them executes anything.

Bytes are flipped, files cut, records swapped, renamed, moved and resized, programs planted; then
the manifest is signed again, so that only the reader of the files protects. An audit hook
listens to the interpreter for anything that a load does not do.

    python -m tools.checkpoint_fuzz --mutants 500 --json benchmarks/checkpoint_fuzz.jsonl
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from phi4.config import Recipe, dump_toml
from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.errors import Phi4Error
from phi4.rundir.manifest import check_recipe
from phi4.rundir.state import read_recipe, read_state
from phi4.stages.pretrain import NextToken
from phi4.verify.measured_rows import append_row, provenance
from tests.support.engines import batches_of, tiny_recipe
from tests.support.hostile import ATTACKS, read_index, sign, write_index

STEP_NAME = "step_0000001"
FORMATS = ("full", "dp")
_WATCHED = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pty.", "webbrowser.", "code.")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
_UNPICKLED = ("torch", "phi4", "megatron", "traceback", "numpy")
"""Packages whose objects the collectives of a load send from rank to rank."""

Mutation = Callable[[Path, random.Random], None]


@dataclass
class Watch:
    """What the interpreter did that no load does. An audit hook cannot be removed, only ignored."""

    active: bool = False
    seen: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See sys.addaudithook."""
        if self.active and _is_foreign(event, arguments):
            self.seen.append(f"{event} {arguments!r}"[:200])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record events inside the context."""
        self.active = True
        try:
            yield
        finally:
            self.active = False


def _is_foreign(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        mode = arguments[1]
        return isinstance(mode, str) and any(letter in mode for letter in "wax+")
    if event == "pickle.find_class":
        module = str(arguments[0])
        return module != "builtins" and module.split(".")[0] not in _UNPICKLED
    if event in ("import", "exec", "compile"):
        return True
    return event.startswith(_WATCHED) and event not in _HARMLESS


def _flip(checkpoint: Path, rng: random.Random) -> None:
    path = _file(checkpoint, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 16))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _overwrite(checkpoint: Path, rng: random.Random) -> None:
    path = _file(checkpoint, rng)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    path.write_bytes(content)


def _cut(checkpoint: Path, rng: random.Random) -> None:
    path = _file(checkpoint, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def _exchange_files(checkpoint: Path, rng: random.Random) -> None:
    first, second = _file(checkpoint, rng), _file(checkpoint, rng)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def _swap_records(checkpoint: Path, rng: random.Random) -> None:
    index = read_index(checkpoint)
    first, second = rng.sample(list(index.storage_data), 2)
    places = index.storage_data
    places[first], places[second] = places[second], places[first]
    write_index(checkpoint, index)


def _rename_record(checkpoint: Path, rng: random.Random) -> None:
    index = read_index(checkpoint)
    described = index.state_dict_metadata
    name = rng.choice(list(described))
    other = rng.choice((name + "x", "../" + name, "", name[: len(name) // 2], "x/shard_0_1"))
    described[other] = described.pop(name)
    write_index(checkpoint, index)


def _redeclare(checkpoint: Path, rng: random.Random) -> None:
    index = read_index(checkpoint)
    described = index.state_dict_metadata
    name = rng.choice(list(described))
    if isinstance(described[name], BytesStorageMetadata):
        tensors = [v for v in described.values() if isinstance(v, TensorStorageMetadata)]
        described[name] = rng.choice(tensors)
    else:
        size = described[name].size
        described[name] = BytesStorageMetadata()
        described[name].size = size
    write_index(checkpoint, index)


def _move_record(checkpoint: Path, rng: random.Random) -> None:
    index = read_index(checkpoint)
    place = index.storage_data[rng.choice(list(index.storage_data))]
    key = rng.choice(("relative_path", "offset", "length", "transform_descriptors"))
    values = {
        "relative_path": ("../x", "/etc/passwd", "common.pt", "recipe.toml", 7, None, ".metadata"),
        "offset": (-1, 1, place.offset + 1, 1 << 40, 1 << 70, 0.5, None),
        "length": (-1, 0, 1, place.length - 1, place.length + 1, 1 << 62, "9"),
        "transform_descriptors": (["zstd"], [], "x"),
    }
    setattr(place, key, rng.choice(values[key]))
    write_index(checkpoint, index)


def _resize(checkpoint: Path, rng: random.Random) -> None:
    index = read_index(checkpoint)
    tensors = [
        v for v in index.state_dict_metadata.values() if not isinstance(v, BytesStorageMetadata)
    ]
    tensor = rng.choice(tensors)
    whole, chunk = list(tensor.size), rng.choice(tensor.chunks)
    factor = rng.choice((0, 2, 1000, -1, 1 << 40))
    resized = torch.Size([length * factor for length in whole])
    rng.choice(
        (
            lambda: setattr(tensor, "size", resized),
            lambda: setattr(chunk, "sizes", resized),
            lambda: setattr(chunk, "offsets", resized),
            lambda: setattr(tensor, "chunks", []),
            lambda: setattr(tensor.properties, "dtype", torch.float64),
            lambda: setattr(tensor, "size", whole),
        )
    )()
    write_index(checkpoint, index)


def _lose_record(checkpoint: Path, rng: random.Random) -> None:
    index = read_index(checkpoint)
    del index.storage_data[rng.choice(list(index.storage_data))]
    write_index(checkpoint, index)


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__.strip("_"): mutation
    for mutation in (
        *(_flip, _overwrite, _cut, _exchange_files, _swap_records, _rename_record),
        *(_redeclare, _move_record, _resize, _lose_record),
    )
}


def _file(checkpoint: Path, rng: random.Random) -> Path:
    """Return the index more often than the rest: it is what decides."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != "manifest.json")
    return rng.choice([*files, *([checkpoint / ".metadata"] * 4), checkpoint / "common.pt"])


def mutate(checkpoint: Path, marker: Path, rng: random.Random) -> str:
    """Change a checkpoint in one way, sign it again, and say which way."""
    kind = rng.choice([*MUTATIONS, *MUTATIONS, "plant", "plant", "manifest"])
    if kind == "plant":
        kind = rng.choice(list(ATTACKS))
        ATTACKS[kind](checkpoint, marker)
    elif kind == "manifest":
        path = checkpoint / "manifest.json"
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return kind
    else:
        MUTATIONS[kind](checkpoint, rng)
    sign(checkpoint)
    return kind


def outcome(engine: Engine, checkpoint: Path) -> str:
    """`loaded`, the kind of error, or what is wrong with how the load ended."""
    try:
        verified = verify_checkpoint(engine, checkpoint)
        check_recipe(checkpoint, verified.manifest, read_recipe(checkpoint))
        read_state(checkpoint)
        load_checkpoint(engine, checkpoint, verified)
    except Phi4Error as error:
        return type(error).__name__ if "\n" not in str(error) else f"several lines: {error}"
    except BaseException as error:
        return f"escaped: {type(error).__name__}: {error}"[:300]
    return "loaded"


@dataclass(frozen=True)
class FuzzReport:
    """Outcomes of the mutants."""

    outcomes: Counter[str]
    kinds: Counter[str]
    executed: tuple[str, ...]
    """Events that no load causes, and markers."""
    unclear: tuple[str, ...]
    """Loads that ended in anything but one line."""


def fuzz(mutants: int, seed: int, work_dir: Path) -> FuzzReport:
    """Load a number of mutants of a checkpoint of each format, in this process.

    Args:
        mutants: shared equally by the formats.
        seed: the same mutants come from the same seed.
        work_dir: takes the checkpoints.
    """
    watch = Watch()
    sys.addaudithook(watch.hook)
    outcomes, kinds, executed, unclear = Counter(), Counter(), [], []
    for first, form in enumerate(FORMATS):
        with _saved(form, work_dir / form) as (engine, pristine):
            _warm_up(engine, pristine, work_dir)
            for number in range(first, mutants, len(FORMATS)):
                copy = _copy(pristine, work_dir / "mutant")
                marker = work_dir / f"executed_{number}"
                kind = mutate(copy, marker, random.Random(f"{seed} {number}"))
                watch.seen.clear()
                with watch.listening():
                    ended = outcome(engine, copy)
                kinds[kind] += 1
                where = f"mutant {number} of seed {seed} ({form}, {kind})"
                executed += [f"{where}: {event}" for event in watch.seen]
                executed += [f"{where}: {marker} exists"] if marker.exists() else []
                if ended.startswith(("escaped", "several")):
                    unclear.append(f"{where}: {ended}")
                else:
                    outcomes[ended] += 1
    return FuzzReport(outcomes, kinds, tuple(executed), tuple(unclear))


def _warm_up(engine: Engine, pristine: Path, work_dir: Path) -> None:
    """Load and refuse once unwatched: both import modules that later loads find imported."""
    outcome(engine, _copy(pristine, work_dir / "mutant"))
    for plant in ATTACKS.values():
        copy = _copy(pristine, work_dir / "mutant")
        plant(copy, work_dir / "warm")
        sign(copy)
        outcome(engine, copy)


def _copy(pristine: Path, target: Path) -> Path:
    checkpoint = target / STEP_NAME
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(pristine, checkpoint)
    return checkpoint


@contextmanager
def _saved(form: str, root: Path) -> Iterator[tuple[Engine, Path]]:
    """An engine, and a checkpoint of it that its writer made."""
    recipe = _recipe(form)
    engine = Engine(recipe, connect("cpu"))
    try:
        engine.train_step(batches_of(engine, 0), NextToken(), learning_rate=1e-2)
        files = {"recipe.toml": dump_toml(recipe), "state.json": "{}"}
        yield engine, save_checkpoint(engine, root, 1, form=form, keep=1, files=files, data={})
    finally:
        engine.close()
        disconnect()


def _recipe(form: str) -> Recipe:
    distributed = str(form == "dp").lower()
    return tiny_recipe("model.num_layers=1", f"parallel.distributed_optimizer={distributed}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append a row to this file")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="phi4_fuzz_") as directory:
        report = fuzz(arguments.mutants, arguments.seed, Path(directory))
    row = {
        "mutants": arguments.mutants,
        "seed": arguments.seed,
        "executed": len(report.executed),
        "not_one_line": len(report.unclear),
        "outcomes": dict(sorted(report.outcomes.items())),
        "kinds": dict(sorted(report.kinds.items())),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(*report.executed, *report.unclear, {**row, **provenance()}, sep="\n")
    if arguments.json:
        append_row(arguments.json, row)
    if report.executed or report.unclear:
        sys.exit(1)


if __name__ == "__main__":
    main()
