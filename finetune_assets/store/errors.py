"""What can be wrong with a store."""

from finetune_assets.errors import UserError


class StoreError(UserError):
    """The store cannot be used as asked."""


class ArtifactMissing(StoreError):
    """Nothing of that name has been published."""


class CorruptArtifact(StoreError):
    """A file of the store is not what its manifest says."""
