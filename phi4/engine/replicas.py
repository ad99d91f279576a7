"""Compare parameters that several ranks hold bit by bit, and check that all are finite."""

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from phi4.engine.agreement import gathered, raise_together
from phi4.engine.bits import are_finite, digests
from phi4.engine.engine import Engine
from phi4.engine.model.gpt import global_parameters
from phi4.engine.optimizer.build import gather_parameters
from phi4.errors import CorruptionError, NotFiniteError


@dataclass(frozen=True)
class Suspicion:
    """One rank's result about itself.

    Attributes:
        rank: global.
        host: host of the rank.
        parameter: the first one whose bits differ from other ranks'; empty if none does.
        is_outvoted: whether most of the ranks that hold the parameter agree against this one.
        is_tied: whether there is no majority, so that this rank or another may be wrong.
    """

    rank: int
    host: str
    parameter: str = ""
    is_outvoted: bool = False
    is_tied: bool = False


def check_replicas(engine: Engine) -> None:
    """Compare the parameters of data and context replicas, and those that tensor ranks share.

    Raises:
        CorruptionError: on every rank, if any two differ; names ranks, hosts and a parameter.

    Collectives: what `gather_parameters` does; all-gathers of 8 bytes per parameter over dp_cp, and
    over tp of the parameters that are not split; one all-gather over all ranks of who differs.
    """
    layout = engine.layout
    with engine.patches:
        gather_parameters(engine.chunks, engine.optimizer)
    named = dict(global_parameters(engine.bare_chunks))
    own = digests(named.values())
    whole = [not getattr(p, "tensor_model_parallel", False) for p in named.values()]
    shared = own[torch.tensor(whole, device=own.device)]
    names = list(named)
    shared_names = [name for name, is_whole in zip(names, whole, strict=True) if is_whole]
    verdicts = [
        _compared(own, names, layout.groups.dp_cp),
        _compared(shared, shared_names, layout.groups.tp),
    ]
    suspicion = next((verdict for verdict in verdicts if verdict.parameter), verdicts[0])
    everyone = gathered(engine.platform, suspicion)
    if any(found.parameter for found in everyone):
        raise CorruptionError(_described(everyone))


def require_finite_parameters(engine: Engine) -> None:
    """Raise an error for parameters that are not finite.

    Raises:
        NotFiniteError: on every rank; names the first parameter of each rank, and its host.

    Collectives: what `gather_parameters` does; one all-gather of the outcome over all ranks.
    """
    with engine.patches:
        gather_parameters(engine.chunks, engine.optimizer)
    named = dict(global_parameters(engine.bare_chunks))
    finite = are_finite(named.values()).tolist()
    bad = [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]
    error = None
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        error = NotFiniteError(
            f"{bad[0]}{others} on {_place(engine.platform.rank, socket.gethostname())}"
        )
    raise_together(engine.platform, error)


def outvoted(values: Sequence[int]) -> tuple[list[int], bool]:
    """Return indices of the values that differ from the majority, and whether there is no majority.

    Without a majority, for example of two, all indices are returned.
    """
    value, votes = Counter(values).most_common(1)[0]
    if votes == len(values):
        return [], False
    if 2 * votes <= len(values):
        return list(range(len(values))), True
    return [index for index, other in enumerate(values) if other != value], False


def _compared(own: torch.Tensor, names: Sequence[str], group: dist.ProcessGroup) -> Suspicion:
    """Return this rank's part in the first difference within a group."""
    rank, host = dist.get_rank(), socket.gethostname()
    if group.size() == 1 or not names:
        return Suspicion(rank, host)
    everyone = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(everyone, own, group=group)
    table = torch.stack(everyone)
    differ = (table != table[0]).any(dim=0).tolist()
    if not any(differ):
        return Suspicion(rank, host)
    first = differ.index(True)
    wrong, is_tied = outvoted(table[:, first].tolist())
    return Suspicion(rank, host, names[first], not is_tied and group.rank() in wrong, is_tied)


def _described(everyone: Sequence[Suspicion]) -> str:
    """Describe which rank is wrong."""
    outvoted_ranks = [found for found in everyone if found.is_outvoted]
    suspects = outvoted_ranks or [found for found in everyone if found.is_tied]
    places = ", ".join(_place(found.rank, found.host) for found in suspects)
    verb = "holds" if len(suspects) == 1 else "hold"
    who = f"{places} {verb}" if outvoted_ranks else f"one of {places} holds"
    return (
        f"{who} other bits of {suspects[0].parameter} than the ranks that must hold the same; "
        "memory or arithmetic of that host is faulty: exclude it, and resume the run from its "
        "newest checkpoint"
    )


def _place(rank: int, host: str) -> str:
    return f"rank {rank} on {host}"
