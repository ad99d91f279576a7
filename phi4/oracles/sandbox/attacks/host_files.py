"""Files of the host, by every known way around the sandbox."""

import os

got = []
for path in (
    "/etc/passwd",
    "/etc/hostname",
    "/proc/1/root/etc/passwd",
    "/proc/self/root/etc/passwd",
    "/proc/1/cwd/etc/passwd",
    "/usr/../etc/passwd",
    "/proc/kcore",
    "/dev/mem",
    "/dev/sda",
    "/dev/vda",
    "/dev/kmsg",
):
    try:
        with open(path, "rb") as file:
            file.read(1)
        got.append(path)
    except OSError:
        pass
got += [path for path in ("/root", "/home", "/var", "/run", "/sys", "/srv") if os.path.exists(path)]
print(", ".join(got) or "refused")
