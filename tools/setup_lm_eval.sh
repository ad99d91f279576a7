#!/usr/bin/env bash
# Builds .venv-lm-eval: lm-eval over the packages of .venv, for the scores that it gives `phi4 serve`.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-lm-eval
stamp=$venv/.phi4-setup
key=$(cat .venv/.phi4-setup tools/setup_lm_eval.sh constraints/lm_eval.txt | sha256sum)
if [ -e "$stamp" ] && [ "$key" = "$(cat "$stamp")" ]; then exit 0; fi
read -ra pip_args <<<"${PIP_ARGS:-}"

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

.venv/bin/python -m venv --clear "$venv"
# addsitedir, unlike a bare path, also reads the .pth file of the editable phi4.
echo "import site; site.addsitedir('$(site_packages .venv)')" >"$(site_packages "$venv")/phi4_shared.pth"
# Everything else that lm-eval imports for this is in .venv.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${pip_args[@]}" \
    -r constraints/lm_eval.txt
HF_HUB_OFFLINE=1 "$venv/bin/python" -c '
import importlib.metadata
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
version = importlib.metadata.version("lm_eval")
assert version == "0.4.13", version'
echo "$key" >"$stamp"
