"""Command-line arguments shared by all workers."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the arguments common to all workers; each worker adds the artifacts that it reads.

    Args:
        module: Name of the worker module, shown as the program name.
        description: Docstring of the worker module.
    """
    parser = argparse.ArgumentParser(prog=module, description=description)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration")
    parser.add_argument("--made-from", type=Path, required=True, help="JSON file that identifies the inputs")
    parser.add_argument("--uris", type=Path, help="JSON file with the store URIs of the inputs")
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--output", type=Path, required=True, help="empty folder for the output artifact")
    return parser


def numbered(rest: Sequence[str], name: str) -> list[Path]:
    """Folders of a numbered flag, in order: `--NAME-0 DIR --NAME-1 DIR ...`.

    Args:
        rest: The arguments that the parser does not know.
        name: Name of the flag, without number.
    """
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return [Path(folder) for flag, folder in pairs if flag.startswith(f"--{name}-")]
