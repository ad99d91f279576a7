"""What tests, resource gate and benchmarks run of attention."""

from phi4_kernels.registry import Entry

ENTRIES: tuple[Entry, ...] = ()
