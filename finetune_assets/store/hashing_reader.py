"""Read a file in pieces, for its upload and for its hash at once."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from finetune_assets.progress import Progress
from finetune_assets.store.objects import CHUNK


class HashingReader:
    """Reads a file once, for both the upload and its sha256."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self.size, self._digest = 0, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """Yield the content from the start. Progress counted by an earlier read is taken back."""
        self.progress.take_back(self.size)
        self.size, self._digest = 0, hashlib.sha256()
        with open(self.path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                self._digest.update(chunk)
                self.size += len(chunk)
                self.progress.add(len(chunk))
                yield chunk
