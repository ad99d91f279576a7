"""Collect proof rows of the kernels from all machines of a run, so that every rank chooses the
same.

On a GPU whose kernels are not proven, one rank of each machine runs the proofs (`phi4_kernels`'
`qualification`) while the others wait. A kernel counts if it is proven on all machines; times are
those of the first one.
"""

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4_kernels import dispatch, registry
from phi4_kernels.errors import KernelError
from phi4_kernels.evidence import GpuMachine, KernelEvidence, Row, machine_of
from phi4_kernels.qualification import Prover, is_needed, qualify

from phi4.config import Recipe
from phi4.engine.agreement import gathered
from phi4.engine.platform import Platform
from phi4.rundir.names import KERNELS_FILE

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Found:
    """Rows of one machine, from one of its ranks."""

    host: str
    rows: tuple[Row, ...]
    """The newest verdict of each implementation and the newest times of each op."""
    new_rows: tuple[Row, ...] = ()
    lines: tuple[str, ...] = ()


def qualified_evidence(
    recipe: Recipe, platform: Platform, say: Say, prover: Callable[[], Prover] | None = None
) -> KernelEvidence | None:
    """Return the proof rows of this run's machines, the same on every rank.

    Args:
        recipe: recipe of the run; `kernels.qualify` off runs no proofs. New rows are written to its
            directory.
        platform: this process.
        say: prints on the writer rank.
        prover: runs the proofs; for tests.

    Returns:
        The evidence; None on a CPU, where it is not used.

    Collectives: on a GPU, an all-gather of host names and one of rows over all ranks.
    """
    if platform.kind != "cuda":
        return None
    host = socket.gethostname()
    is_first = gathered(platform, host).index(host) == platform.rank
    own = _qualified(recipe, platform, host, prover or _gpu_prover(platform)) if is_first else None
    machines = [found for found in gathered(platform, own) if found is not None]
    for found in machines:
        for line in found.lines:
            say(f"{found.host}: {line}" if len(machines) > 1 else line)
    if platform.is_writer:
        _record(Path(recipe.run.dir) / KERNELS_FILE, machines)
    return agreed([found.rows for found in machines])


def agreed(machines: Sequence[tuple[Row, ...]]) -> KernelEvidence:
    """Return what holds on all machines: implementations proven on each and failed on none.

    Args:
        machines: rows of each machine.
    """
    verdicts = [
        {(row["op"], row["implementation"]): row for row in rows if "implementation" in row}
        for rows in machines
    ]
    first = [row for row in machines[0] if "implementation" not in row]
    for candidate, row in verdicts[0].items():
        elsewhere = [found[candidate] for found in verdicts if found.get(candidate)]
        if len(elsewhere) == len(verdicts):
            first.append(next((other for other in elsewhere if not other["green"]), row))
    return KernelEvidence(tuple(first), dispatch.known().speed)


def _gpu_prover(platform: Platform) -> Callable[[], Prover]:
    def make() -> Prover:
        # Imports the bench and the gates, which other runs do not need.
        from phi4_kernels.qualification.gpu import GpuProver

        return GpuProver(platform.device)

    return make


def _qualified(
    recipe: Recipe, platform: Platform, host: str, prover: Callable[[], Prover]
) -> _Found:
    machine, evidence = machine_of(platform.device), dispatch.known()
    if recipe.kernels.qualify == "off" or not is_needed(machine, evidence):
        return _Found(host, _newest(evidence, machine))
    try:
        done = qualify(prover())
    except (KernelError, OSError, RuntimeError) as error:
        line = f"the kernels were not qualified: {type(error).__name__}: {error}"
        return _Found(host, _newest(evidence, machine), lines=(line,))
    lines = [f"kernels qualified on this {machine.device} in {done.seconds:.0f} s"]
    lines += [f.describe() for f in done.findings if f.verdict != "proven"]
    if done.problem is not None:
        lines.append(f"the results are not saved for the next start: {done.problem}")
    return _Found(host, _newest(done.evidence, machine), done.rows, tuple(lines))


def _newest(evidence: KernelEvidence, machine: GpuMachine) -> tuple[Row, ...]:
    """Return the rows that decide on this machine."""
    rows = []
    for op in registry.OPS:
        names = dispatch.candidates(op)
        verdicts = [evidence.verdict(op, name, machine) for name in names]
        rows += [row for row in verdicts if row is not None]
        proven = [name for name in names if evidence.proof(op, name, machine)]
        times = evidence.times(op, [*proven, "torch"], machine) if proven else None
        rows += [times] if times is not None else []
    return tuple(rows)


def _record(path: Path, machines: Sequence[_Found]) -> None:
    lines = [json.dumps({"host": m.host, **row}) for m in machines for row in m.new_rows]
    if lines:
        with path.open("a", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")
