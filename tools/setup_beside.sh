#!/usr/bin/env bash
# Builds .venv-NAME: packages of its own over those of .venv, for tests that compare with them.
#
# Usage: tools/setup_beside.sh NAME CHECK PIP_ARGUMENT...
#   CHECK: Python that fails where the environment lacks something.
# Does nothing when .venv, the arguments and constraints/ are those of the last time.
# Environment: PIP_ARGS (passed to pip).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-$1 check=$2
shift 2
stamp=$venv/.phi4-setup
key=$({ cat .venv/.phi4-setup tools/setup_beside.sh constraints/*.txt && echo "$check $*"; } | sha256sum)
if [ -e "$stamp" ] && [ "$key" = "$(cat "$stamp")" ]; then exit 0; fi
read -ra pip_args <<<"${PIP_ARGS:-}"

site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

.venv/bin/python -m venv --clear "$venv"
# addsitedir, unlike a bare path, also reads the .pth file of the editable phi4.
echo "import site; site.addsitedir('$(site_packages .venv)')" >"$(site_packages "$venv")/phi4_shared.pth"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pip_args[@]}" "$@"
HF_HUB_OFFLINE=1 "$venv/bin/python" -c "$check"
echo "$key" >"$stamp"
