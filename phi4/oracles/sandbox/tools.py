"""The programs that build the sandbox: where they are, or what is missing.

The decision: they are looked for in the system's own directories and never along PATH, because a
program that a user can replace is no wall.
"""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

from phi4.errors import PlatformError
from phi4.oracles.sandbox.seccomp import machines

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
NOBODY = 65534
"""Owner of the sandbox's processes where root asks for them."""


@dataclass(frozen=True)
class Tools:
    """What a sandbox is built with.

    Attributes:
        bwrap: path of bubblewrap.
        bwrap_version: for example `0.8.0`.
        setpriv: path, where this process is root; else None.
        machine: of the system call filter.
    """

    bwrap: str
    bwrap_version: str
    setpriv: str | None
    machine: str


def find_tools(search_path: str = SYSTEM_PATH) -> Tools:
    """The tools of this machine.

    Args:
        search_path: directories, separated by colons.

    Raises:
        PlatformError: one is missing; the message says how to get it.
    """
    bwrap = _find("bwrap", "bubblewrap", search_path)
    _find("prlimit", "util-linux", search_path)
    if not os.path.exists("/usr/bin/prlimit"):
        raise PlatformError("prlimit is not /usr/bin/prlimit, which the sandbox can see")
    # A root of the host stays root for the kernel inside a user namespace: it must be left before.
    setpriv = _find("setpriv", "util-linux", search_path) if os.geteuid() == 0 else None
    machine = platform.machine()
    if machine not in machines():
        known = ", ".join(machines())
        raise PlatformError(f"the sandbox has no system call filter for {machine}; only {known}")
    try:
        told = subprocess.run([bwrap, "--version"], capture_output=True, text=True, env={})
    except OSError as error:
        raise PlatformError(f"{bwrap} does not start: {error}") from error
    return Tools(bwrap, told.stdout.strip().removeprefix("bubblewrap "), setpriv, machine)


def _find(program: str, package: str, search_path: str) -> str:
    found = shutil.which(program, path=search_path)
    if found is None:
        raise PlatformError(
            f"{program} is not in {search_path}; install {package} (apt-get install {package})"
        )
    return found
