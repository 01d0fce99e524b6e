#!/usr/bin/env bash
# Installs what the lock files name into a Python's environment, each file only if its sha256 is the locked one:
#
#   requirements/install.sh PYTHON runtime|dev [PROJECT]       PROJECT: arguments of pip, such as `--editable .`
#
# PyTorch's build is the one that pip would choose (PyPI's, with CUDA, unless PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS have
# another), or that of the index TORCH alone. Each build has a lock file of its own. Offline: PIP_NO_INDEX=1 and
# PIP_FIND_LINKS=FOLDER, or PIP_INDEX_URL of a mirror.
set -euo pipefail
python=$1
kind=$2
shift 2
locks=$(cd "$(dirname "$0")" && pwd)

install() { "$python" -m pip --quiet --disable-pip-version-check install "$@"; }
# The locks name every dependency. Without isolation, since what builds a source distribution is locked too
locked() { install --no-deps --no-build-isolation --use-pep517 --require-hashes "$@"; }

locked -r "$locks/build.txt"

wanted=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$locks/torch.txt")
version=$(install --dry-run --ignore-installed --no-deps --only-binary :all: --report - \
    ${TORCH:+--index-url "$TORCH"} "$wanted" |
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])')
case $version in
    *+*) torch=$locks/torch-${version#*+}.txt ;;
    *) torch=$locks/torch.txt ;;
esac
if [ ! -e "$torch" ]; then
    echo "torch $version of ${TORCH:-the configured index} has no lock file ${torch##*/}." \
        "Write it with \`make lock TORCH=https://download.pytorch.org/whl/${version#*+}\`, or set TORCH to another index." >&2
    exit 1
fi
locked ${TORCH:+--index-url "$TORCH"} -r "$torch"

others=(-r "$locks/runtime.txt")
[ "$kind" = runtime ] || others+=(-r "$locks/$kind.txt")
locked "${others[@]}"
[ $# -eq 0 ] || install --no-deps --no-build-isolation "$@"
conflicts=$("$python" -m pip --disable-pip-version-check check) || {
    echo "$conflicts" >&2
    exit 1
}
