#!/usr/bin/env bash
# Builds .venv-tf4: transformers 4.57 over the packages of .venv, for the tests of conversion.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-tf4
stamp=$venv/.phi4-setup
key=$(cat .venv/.phi4-setup tools/setup_transformers4.sh | sha256sum)
if [ -e "$stamp" ] && [ "$key" = "$(cat "$stamp")" ]; then exit 0; fi
read -ra pip_args <<<"${PIP_ARGS:-}"

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

.venv/bin/python -m venv --clear "$venv"
# addsitedir, unlike a bare path, also reads the .pth file of the editable phi4.
echo "import site; site.addsitedir('$(site_packages .venv)')" >"$(site_packages "$venv")/phi4_shared.pth"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pip_args[@]}" \
    -c constraints/cpu.txt 'transformers>=4.57,<4.58'
"$venv/bin/python" -c '
import phi4, torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__'
echo "$key" >"$stamp"
