#!/usr/bin/env bash
# Prints each action and image that deploy/ pins, with the digest that its version has now; exit code 1 if one differs.
# Needs git and docker, and reaches github.com and the registry. To move to a version, change the comment or the tag here
# and take the digest that this prints.
set -euo pipefail
cd "$(dirname "$0")/.."
changed=0

compare() {
    [ "$2" = "$3" ] && echo "$1: $2" && return
    echo "$1: pinned $2, now ${3:-not found}"
    changed=1
}

while read -r action pinned tag; do
    now=$(git ls-remote "https://github.com/$action" "refs/tags/$tag" "refs/tags/$tag^{}" | tail -1 | cut -f1)
    compare "$action $tag" "$pinned" "$now"
done < <(grep -rhoE 'uses: [^@]+@[0-9a-f]{40} # v[0-9.]+' deploy | sed 's/uses: //; s/[@#]/ /g' | sort -u)

while IFS=@ read -r image pinned; do
    compare "$image" "$pinned" "$(docker buildx imagetools inspect "$image" --format '{{.Manifest.Digest}}')"
done < <(grep -rhoE '[a-z0-9./-]+:[A-Za-z0-9.-]+@sha256:[0-9a-f]{64}' deploy --exclude=pin.sh | sort -u)
exit "$changed"
