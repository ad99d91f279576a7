"""Settings of the host's kernel, opened for writing; nothing is written."""

import os

got = []
for path in (
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/vm/drop_caches",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sysrq-trigger",
    "/proc/sys/user/max_user_namespaces",
):
    try:
        os.close(os.open(path, os.O_WRONLY))
        got.append(path)
    except OSError:
        pass
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1")
    got.append("oom_score_adj")
except OSError:
    pass
print(", ".join(got) or "refused")
