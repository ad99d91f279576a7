#!/usr/bin/env bash
# Builds .venv-trl: trl over the packages of .venv, for the comparison of SFT and DPO with it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-trl
stamp=$venv/.phi4-setup
key=$(cat .venv/.phi4-setup tools/setup_trl.sh constraints/trl.txt | sha256sum)
if [ -e "$stamp" ] && [ "$key" = "$(cat "$stamp")" ]; then exit 0; fi
read -ra pip_args <<<"${PIP_ARGS:-}"

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

.venv/bin/python -m venv --clear "$venv"
# addsitedir, unlike a bare path, also reads the .pth file of the editable phi4.
echo "import site; site.addsitedir('$(site_packages .venv)')" >"$(site_packages "$venv")/phi4_shared.pth"
# Everything else that trl needs is in .venv.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${pip_args[@]}" \
    -r constraints/trl.txt
HF_HUB_OFFLINE=1 "$venv/bin/python" -c '
import torch, transformers, trl
from trl import DPOTrainer, SFTTrainer
assert trl.__version__ == "1.16.0", trl.__version__'
echo "$key" >"$stamp"
