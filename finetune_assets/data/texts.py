"""Reads general text that no adapter is trained on, for measuring forgetting."""

import json
from pathlib import Path

from finetune_assets.data.errors import DataError

SAMPLE = Path(__file__).parent.parent / "sample"
PACKAGED = {"general": SAMPLE / "general.txt", "demo-prose": SAMPLE / "demo_prose.txt"}
SUFFIXES = (".txt", ".jsonl")


def read_texts(path: Path) -> list[str]:
    """Read the texts of a file or of all files in a folder: paragraphs of .txt, the `text` of each line of .jsonl.

    Raises:
        DataError: naming file and line, if there is no text or a line cannot be read.
    """
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
    texts = [text for file in files for text in _of_file(file)]
    if not texts:
        raise DataError(
            f"evaluation.general_text: {path}: no text found; use a .txt file of paragraphs or a .jsonl file of "
            '{"text": "..."} lines'
        )
    return texts


def _of_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"evaluation.general_text: {path}: not UTF-8 at byte {e.start}; save it as UTF-8") from e
    if path.suffix == ".txt":
        return [paragraph for part in content.split("\n\n") if (paragraph := part.strip())]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(
                f'evaluation.general_text: {path}:{number}: expected {{"text": "..."}}, found {line[:60]!r}'
            )
        texts.append(text)
    return [text for text in texts if text.strip()]
