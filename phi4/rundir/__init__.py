"""The content of a run directory: checkpoints, state, logs, the lease. No torch, no ranks."""

from phi4.rundir.lease import Lease, held_lease, inherited_lease, require_free
from phi4.rundir.process import Process, this_process

__all__ = [
    "Lease",
    "Process",
    "held_lease",
    "inherited_lease",
    "require_free",
    "this_process",
]
