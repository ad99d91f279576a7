"""Find the programs that build the sandbox.

They are searched in the system's own directories and never along PATH, because a program that a
user can replace provides no isolation.
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
"""User of the sandbox's processes if this process is root."""


@dataclass(frozen=True)
class Tools:
    """Programs and machine of a sandbox.

    Attributes:
        bwrap: path of bubblewrap.
        bwrap_version: for example `0.8.0`.
        setpriv: path, if this process is root; else None.
        machine: machine of the system call filter.
    """

    bwrap: str
    bwrap_version: str
    setpriv: str | None
    machine: str


def find_tools(search_path: str = SYSTEM_PATH) -> Tools:
    """Find the tools of this machine.

    Args:
        search_path: directories, separated by colons.

    Raises:
        PlatformError: one is missing; the message says how to install it.
    """
    bwrap = _find("bwrap", "bubblewrap", search_path)
    _find("prlimit", "util-linux", search_path)
    if not os.path.exists("/usr/bin/prlimit"):
        raise PlatformError("prlimit is not /usr/bin/prlimit, the only path visible in the sandbox")
    # A root user of the host stays root for the kernel inside a user namespace, so it must be
    # dropped first.
    setpriv = _find("setpriv", "util-linux", search_path) if os.geteuid() == 0 else None
    machine = platform.machine()
    if machine not in machines():
        known = ", ".join(machines())
        raise PlatformError(f"the sandbox has no system call filter for {machine}; only {known}")
    try:
        told = subprocess.run([bwrap, "--version"], capture_output=True, text=True, env={})
    except OSError as error:
        raise PlatformError(f"{bwrap} cannot be started: {error}") from error
    return Tools(bwrap, told.stdout.strip().removeprefix("bubblewrap "), setpriv, machine)


def _find(program: str, package: str, search_path: str) -> str:
    found = shutil.which(program, path=search_path)
    if found is None:
        raise PlatformError(
            f"{program} is not in {search_path}; install {package} (apt-get install {package})"
        )
    return found
