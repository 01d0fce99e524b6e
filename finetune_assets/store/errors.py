"""Errors of the artifact store."""

from finetune_assets.errors import UserError


class StoreError(UserError):
    """The store is misconfigured, unavailable, or rejects a request."""


class ArtifactMissing(StoreError):
    """No artifact with this name has been published."""


class CorruptArtifact(StoreError):
    """A file in the store is missing or differs from its manifest."""


class ForeignContent(StoreError):
    """An artifact's files are not those that its name identifies: somebody else wrote it."""


class UnreadableObject(StoreError):
    """One object of the store cannot be read, such as a link; others can."""
