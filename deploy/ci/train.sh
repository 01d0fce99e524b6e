#!/usr/bin/env bash
# Installs, and materializes an experiment: EXPERIMENT, or each whose file has changed since the commit SINCE. What the store
# has already is not made again. Everything else is the environment's: FINETUNE_STORE, FINETUNE_LAUNCHER, ...
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
if ! "$python" -c 'from importlib.util import find_spec as f; exit(not (f("dagster") and f("torch")))'; then
    "$python" -m venv .venv
    python=.venv/bin/python
    requirements/install.sh "$python" runtime .
fi

names=${EXPERIMENT:-$(git diff --name-only --diff-filter=AM "${SINCE:?EXPERIMENT or SINCE must be set}" -- configs/experiments |
    sed -n 's|.*/\(.*\)\.yaml$|\1|p')}
DAGSTER_HOME=${DAGSTER_HOME:-$(mktemp -d)}
export DAGSTER_HOME
[ -n "$names" ] || echo "no experiment has changed since $SINCE"
for name in $names; do
    echo "== $name"
    "$python" -m dagster asset materialize --select '*adapter_evaluation' --partition "$name" -m finetune_assets.definitions
done
