"""Artifacts that a later code version computed again, with exactly the content of an earlier version's artifact.

A new code version may change the content for some inputs only. Where it does not, the earlier artifact keeps its
identity, so that nothing downstream is computed again.
"""

import re

from finetune_assets.store.artifacts import ArtifactRef, ArtifactStore

SAME_AS = "same_as"
"""Provenance key: fingerprint of the earlier artifact of the same kind with the same content."""


def canonical(store: ArtifactStore, ref: ArtifactRef) -> ArtifactRef:
    """The earlier artifact with the same content, if there is one that the store still has; otherwise the artifact."""
    manifest = store.manifest(ref.kind, ref.name)
    earlier = manifest.made_from.get(SAME_AS) if manifest else None
    if not isinstance(earlier, str) or not re.fullmatch("[0-9a-f]{64}", earlier):
        return ref
    return store.find(ref.kind, earlier) or ref
