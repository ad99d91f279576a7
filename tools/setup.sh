#!/usr/bin/env bash
# Builds .venv: the packages of constraints/ and phi4 itself, editable. Does nothing when the
# files that define it are unchanged. `make demo` and `make test` call it.
#
# Environment: PYTHON (default: python3), PIP_ARGS (passed to pip).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.phi4-setup
installed=no
[ ! -e "$stamp" ] || installed=yes
python=$(NEED_DISK_GB=$([ $installed = yes ] && echo 1 || echo 5) sh tools/check_machine.sh)
read -ra pip_args <<<"${PIP_ARGS:-}"

# The directory is part of the key: a virtual environment does not survive a move.
key=$({ cat constraints/*.txt pyproject.toml setup.py tools/setup.sh && pwd; } | sha256sum)
if [ $installed = yes ] && [ "$key" = "$(cat "$stamp")" ]; then exit 0; fi

# Torch's CUDA build demands another triton than the CPU build, so the build picks the constraints.
# pip is asked before it downloads, because the CUDA build is 2.7 GB.
torch_build() {
    "$venv/bin/python" - "$(sed -n 's/^torch==//p' constraints/cpu.txt)" "${pip_args[@]}" <<'PY'
import importlib.metadata, json, subprocess, sys

pin, *pip_args = sys.argv[1:]
try:
    found = importlib.metadata.version("torch").partition("+")[0]
except importlib.metadata.PackageNotFoundError:
    found = None
if found == pin:
    requires = importlib.metadata.requires("torch")
else:
    ask = "-m pip install --quiet --dry-run --ignore-installed --no-deps --report -".split()
    answer = subprocess.run(
        [sys.executable, *ask, *pip_args, f"torch=={pin}"], stdout=subprocess.PIPE, check=True
    )
    requires = json.loads(answer.stdout)["install"][0]["metadata"]["requires_dist"]
print("cuda" if any(line.startswith("triton") for line in requires) else "cpu")
PY
}

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"
build=$(torch_build)
if [ "$build" = cuda ] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "phi4: pip will take the CUDA build of torch: 2.7 GB to download, 6 GB on disk."
    command -v nvidia-smi >/dev/null ||
        echo "phi4: there is no nvidia-smi here; the CPU build is 0.2 GB (README, section Set-up)."
    NEED_DISK_GB=10 sh tools/check_machine.sh >/dev/null
elif [ "$build" = cpu ] && command -v nvidia-smi >/dev/null; then
    echo "phi4: there is a GPU here, but pip takes the CPU build of torch; phi4 will not use the GPU."
fi
echo "phi4: installing into $venv (constraints/$build.txt)"
"$venv/bin/python" -m pip install --disable-pip-version-check "${pip_args[@]}" \
    -c "constraints/$build.txt" -e '.[dev,triton]'

# Old pip can leave an editable install that is importable from the checkout only.
(cd / && "$OLDPWD/$venv/bin/python" -c 'import phi4, phi4_kernels')
echo "$key" >"$stamp"
echo "phi4: $venv is ready"
