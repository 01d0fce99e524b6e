"""Results of simulations, kept on this machine: the same question is answered once."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Results:
    """A folder of results, each a small JSON file named by the sha256 of what it answers.

    A file that is damaged, or of another question, counts as none.

    Attributes:
        folder: Where they are kept.
    """

    folder: Path

    def get(self, question: Mapping[str, Any], names: set[str]) -> dict[str, Any] | None:
        """The result of a question, if it is kept whole; it has these names."""
        try:
            kept = json.loads(self._file(question).read_bytes())
            result = kept["result"]
            whole = kept["sum"] == _sum(question, result)
            return result if whole and set(result) == names else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, question: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a result. A disk that takes none costs time alone: the question is answered again."""
        file = self._file(question)
        written = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
        content = {"question": question, "result": result, "sum": _sum(question, result)}
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                written.write_text(json.dumps(content), encoding="utf-8")
                written.replace(file)
            finally:
                written.unlink(missing_ok=True)

    def _file(self, question: Mapping[str, Any]) -> Path:
        return self.folder / f"{_sum(question)}.json"


def _sum(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
