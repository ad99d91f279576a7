"""More memory in one process than its address space may have."""

import mmap

kept: list[mmap.mmap] = []
try:
    while len(kept) < 24:
        kept.append(mmap.mmap(-1, 64 << 20))
    print(f"{64 * len(kept)} MiB")
except OSError:
    print("refused")
