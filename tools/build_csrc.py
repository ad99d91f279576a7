"""Builds csrc/ for sm_90a with plain nvcc into build/csrc/<hash>/, and reads ptxas's report.

    python tools/build_csrc.py            # nothing to do where the hash is built
    python tools/build_csrc.py --budgets  # also writes kernels/budgets/csrc-<nvcc>.json

No nvcc is not an error: it says so, and the ops say the same when they are asked for.
"""

import argparse
import fcntl
import json
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from phi4_kernels import cuda_library, registry

REPORT = "ptxas.txt"
_TORCH = Path(torch.__file__).parent
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?"
    r"(?P<stack_bytes>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared_bytes>\d+) bytes smem)?",
    re.DOTALL,
)
# Itanium ABI: a name's length, the name, I arguments E; f is float, Lb1E true, Li2E the int 2.
_ARGUMENT = re.compile(r"(f)|\d+(__nv_bfloat16|__half)|Lb([01])E|Li(\d+)E")
_MANGLED = re.compile(
    rf"\d(?P<name>[a-z][a-z_]*_kernel)(?:I(?P<arguments>(?:{_ARGUMENT.pattern})+)E)?"
)
_BOOLEANS = {"0": "false", "1": "true"}


def build() -> Path:
    """Compile and link what is not built yet.

    Returns:
        The folder of the library and its report; complete, or absent.

    Raises:
        FileNotFoundError: nvcc is not on the path.
        RuntimeError: it fails; its output is the message.
    """
    target = cuda_library.folder()
    if (target / cuda_library.LIBRARY).exists():
        return target
    if shutil.which("nvcc") is None:
        raise FileNotFoundError("nvcc is not on PATH; expected CUDA 12.8 or newer; install it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        (target.parent / "lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=target.parent, prefix="partial-") as scratch,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / cuda_library.LIBRARY).exists():
            return target
        units = [path for path in cuda_library.sources() if path.suffix in (".cu", ".cpp")]
        objects = [Path(scratch) / f"{unit.stem}{unit.suffix}.o" for unit in units]
        with ThreadPoolExecutor(2) as pool:
            reports = list(pool.map(_compile, units, objects))
        done = Path(scratch) / "done"
        done.mkdir()
        # Named, not located: the torch that loads the library has loaded its own before.
        torch_library = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu")
        output = str(done / cuda_library.LIBRARY)
        _nvcc("-shared", "-arch=sm_90a", *map(str, objects), *torch_library, "-o", output)
        (done / REPORT).write_text("".join(reports))
        done.rename(target)
    return target


def _compile(unit: Path, output: Path) -> str:
    torch_flags = (
        (cuda_library.TORCH_TARGET, f"-I{_TORCH / 'include'}")
        if unit.name == "bindings.cpp"
        else ()
    )
    return _nvcc(
        *cuda_library.NVCC_FLAGS, "-Xptxas=-v", *torch_flags, "-c", str(unit), "-o", str(output)
    )


def _nvcc(*arguments: str) -> str:
    done = subprocess.run(["nvcc", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stderr


def resources(report: str) -> dict[str, dict[str, int]]:
    """Registers, stack, spills and static shared memory of each kernel, by readable name."""
    found = {}
    for match in _KERNEL.finditer(report):
        numbers = match.groupdict(default="0")
        name = readable(numbers.pop("name"))
        found[name] = {key: int(value) for key, value in numbers.items()}
    return found


def readable(mangled: str) -> str:
    """`cast_kernel<float, true, 2>` of a kernel's mangled name.

    Knows the template arguments that csrc uses: float, named types, bool and int. A demangler would
    know all of them, but no machine has to have one.

    Raises:
        RuntimeError: the name is of another form.
    """
    parts = _MANGLED.search(mangled)
    if parts is None:
        raise RuntimeError(f"{mangled} is not the mangled name of a kernel of csrc")
    arguments = [
        "float" if builtin else named or number or _BOOLEANS[boolean]
        for builtin, named, boolean, number in _ARGUMENT.findall(parts["arguments"] or "")
    ]
    return parts["name"] + (f"<{', '.join(arguments)}>" if arguments else "")


def budget_path() -> Path:
    """Return the budget of the installed nvcc, which decides how registers are allocated."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V(\d+\.\d+)\.", text)
    if version is None:
        raise RuntimeError(f"nvcc --version names no version: {text}")
    return registry.ROOT.parent / f"budgets/csrc-{version[1]}.json"


def write_budgets(found: dict[str, dict[str, int]]) -> None:
    """Replace the budget of the installed nvcc."""
    lines = [f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    budget_path().write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Build, and print what each kernel takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", action="store_true", help="write the resource budget")
    arguments = parser.parse_args()
    try:
        target = build()
    except FileNotFoundError as error:
        print(f"csrc is not built: {error}")
        return
    found = resources((target / REPORT).read_text())
    for name, numbers in sorted(found.items()):
        print(f"{name:<42}{numbers['registers']:>4} registers {numbers['stack_bytes']:>3} B stack")
    print(target / cuda_library.LIBRARY)
    if arguments.budgets:
        write_budgets(found)


if __name__ == "__main__":
    main()
