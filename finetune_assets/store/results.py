"""Cache on this machine of small results that are computed from code and inputs alone."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_assets.store import modes


@dataclass(frozen=True)
class Results:
    """A folder of results, each a small JSON file named by the SHA-256 of its question.

    A damaged file, or one that belongs to a different question, counts as a cache miss.

    Attributes:
        folder: Folder of the result files.
    """

    folder: Path

    def get(self, question: Mapping[str, Any], names: set[str]) -> dict[str, Any] | None:
        """Return the cached result of a question; None if it is missing, damaged, or has other keys than `names`."""
        try:
            cached = json.loads(self._file(question).read_bytes())
            result = cached["result"]
            intact = cached["sum"] == _sum(question, result)
            return result if intact and set(result) == names else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, question: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Cache a result. Disk errors are ignored: the result is computed again next time."""
        file = self._file(question)
        temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
        content = {"question": question, "result": result, "sum": _sum(question, result)}
        with suppress(OSError):
            modes.make_folders(file.parent)
            try:
                modes.write_file(temporary, json.dumps(content).encode())
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)

    def _file(self, question: Mapping[str, Any]) -> Path:
        return self.folder / f"{_sum(question)}.json"


@cache
def code_and_libraries(code: tuple[Path, ...], libraries: tuple[str, ...]) -> dict[str, Any]:
    """Part of a question: SHA-256 of Python code, and versions of the libraries that it uses.

    Args:
        code: Python files, and folders of such files.
        libraries: Names of packages.
    """
    files = [file for path in code for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {"code": content, "libraries": {name: version(name) for name in libraries}}


def _sum(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
