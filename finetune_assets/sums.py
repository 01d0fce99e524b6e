"""SHA256SUMS: what each file of an adapter's folder is, as `sha256sum --check` reads it."""

from pathlib import Path

from finetune_assets.hashing import sha256

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Say what each file of a folder is."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
