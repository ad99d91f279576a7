#!/usr/bin/env bash
# Builds .venv: the packages of constraints/ and phi4 itself, editable. Does nothing when the
# files that define it are unchanged. `make demo` and `make test` call it.
#
# Environment: PYTHON (default: python3), PIP_ARGS (passed to pip), TORCH (cpu: torch's CPU build;
# empty: the build that .venv has, or else the one that pip takes with its own settings).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.phi4-setup
wanted=${TORCH:-}
case $wanted in
'' | cpu) ;;
*)
    echo "phi4: got TORCH=$wanted; expected TORCH=cpu, or no TORCH for the build that pip takes" >&2
    exit 2
    ;;
esac

# The stamp's first line is what .venv was built from, its second the build of torch.
installed=no
if [ -e "$stamp" ] && [ "$wanted $(sed -n 2p "$stamp")" != "cpu cuda" ]; then installed=yes; fi
python=$(NEED_DISK_GB=$([ $installed = yes ] && echo 1 || echo 5) sh tools/check_machine.sh)
read -ra pip_args <<<"${PIP_ARGS:-}"

# The directory is part of the key: a virtual environment does not survive a move.
key=$({ cat constraints/*.txt pyproject.toml setup.py tools/setup.sh && pwd; } | sha256sum)
if [ $installed = yes ] && [ "$key" = "$(sed -n 1p "$stamp")" ]; then exit 0; fi

# Torch's CUDA build demands another triton than the CPU build, so the build picks the constraints.
# pip is asked before it downloads, because the CUDA build is 2.7 GB.
torch_build() { # installed: of .venv, empty where pip has to install torch; pip: that pip would take
    "$venv/bin/python" - "$1" "$(sed -n 's/^torch==//p' constraints/cpu.txt)" "${pip_args[@]}" <<'PY'
import importlib.metadata, json, subprocess, sys

asked, pin, *pip_args = sys.argv[1:]
if asked == "installed":
    try:
        if importlib.metadata.version("torch").partition("+")[0] != pin:
            sys.exit()
        requires = importlib.metadata.requires("torch")
    except importlib.metadata.PackageNotFoundError:
        sys.exit()
else:
    ask = "-m pip install --quiet --dry-run --ignore-installed --no-deps --report -".split()
    answer = subprocess.run(
        [sys.executable, *ask, *pip_args, f"torch=={pin}"], stdout=subprocess.PIPE, check=True
    )
    requires = json.loads(answer.stdout)["install"][0]["metadata"]["requires_dist"]
print("cuda" if any(line.startswith("triton") for line in requires or ()) else "cpu")
PY
}

make_venv() { "$python" -m venv --clear "$venv"; }

"$venv/bin/python" -c 'import pip' 2>/dev/null || make_venv
rm -f "$stamp"
build=$(torch_build installed)
if [ "$wanted $build" = "cpu cuda" ]; then
    echo "phi4: $venv has torch's CUDA build, TORCH=cpu asks for the CPU build: building $venv again"
    make_venv
    build=
fi
build=${build:-$(torch_build pip)}
if [ "$wanted $build" = "cpu cuda" ]; then
    # Only where pip's own settings do not lead to the CPU build already.
    index=$(cat constraints/torch_cpu_index.txt)
    pip_args+=(--extra-index-url "$index")
    build=$(torch_build pip)
    if [ "$build" = cuda ]; then
        echo "phi4: TORCH=cpu, but pip got torch's CUDA build; expected the CPU build of $index;" \
            "check that this machine reaches it, or name a mirror with PIP_EXTRA_INDEX_URL" >&2
        exit 1
    fi
fi
if [ "$build" = cuda ] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "phi4: pip will take the CUDA build of torch: 2.7 GB to download, 6 GB on disk."
    command -v nvidia-smi >/dev/null ||
        echo "phi4: there is no nvidia-smi here; for the CPU build, 0.2 GB, stop this and add TORCH=cpu."
    NEED_DISK_GB=10 sh tools/check_machine.sh >/dev/null
elif [ "$build" = cpu ] && command -v nvidia-smi >/dev/null; then
    echo "phi4: there is a GPU here, but pip takes the CPU build of torch; phi4 will not use the GPU."
fi
echo "phi4: installing into $venv (constraints/$build.txt)"
"$venv/bin/python" -m pip install --disable-pip-version-check "${pip_args[@]}" \
    -c "constraints/$build.txt" -e '.[dev,triton]'

# Old pip can leave an editable install that is importable from the checkout only.
(cd / && "$OLDPWD/$venv/bin/python" -c 'import phi4, phi4_kernels')
printf '%s\n' "$key" "$build" >"$stamp"
echo "phi4: $venv is ready"
