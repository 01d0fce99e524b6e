"""References to published artifacts."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ArtifactRef:
    """A small, typed reference to a published artifact. Assets pass these references to one another.

    Attributes:
        kind: Artifact kind, such as `tokenized`.
        name: Path below the kind: the fingerprint, or `<repo>/<revision>` for base models.
        fingerprint: Identity of the content.
        uri: Location of the files.
        files: Number of files.
        size: Total size of the files in bytes.
        content: Hash of the paths and hashes of the files; empty if unknown.
    """

    kind: str
    name: str
    fingerprint: str
    uri: str
    files: int
    size: int
    content: str = ""

    @property
    def attempt(self) -> str:
        """Name of the publish attempt: the last segment of the URI."""
        return self.uri.rpartition("/")[2]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
