"""Command-line arguments shared by all workers."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from finetune_assets.config.schema import ExperimentConfig


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
    parser.add_argument("--bases", type=Path, help="JSON file with the versions (repo@revision) of the base models")
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--output", type=Path, required=True, help="empty folder for the output artifact")
    return parser


def trusts(config: ExperimentConfig, bases: Path | None, flag: str = "base-model") -> bool:
    """Whether the experiment trusts the own code of a base model.

    Args:
        config: The settings of the experiment, never those of an artifact.
        bases: File with the version of each base model, by flag.
        flag: Flag of the base model's folder, without dashes.
    """
    trusted = config.model.trust_remote_code
    if trusted is None or bases is None:
        return False
    return bool(json.loads(bases.read_text(encoding="utf-8")).get(flag) == trusted)


def numbered(rest: Sequence[str], name: str) -> list[Path]:
    """Folders of a numbered flag, in order: `--NAME-0 DIR --NAME-1 DIR ...`.

    Args:
        rest: The arguments that the parser does not know.
        name: Name of the flag, without number.
    """
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return [Path(folder) for flag, folder in pairs if flag.startswith(f"--{name}-")]
