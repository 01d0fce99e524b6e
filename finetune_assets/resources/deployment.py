"""Where this deployment keeps things: environment variables, with defaults for a laptop.

FINETUNE_CONFIGS: folder of the configuration files; default `configs/` of the project.
FINETUNE_STORE: URL of the artifact store; default `file://<project>/.finetune/store`.
FINETUNE_NAMESPACE: keeps one developer's or branch's artifacts from another's; default the user's name.
FINETUNE_CACHE: node-local folder for fetched artifacts and running jobs; default `<project>/.finetune/cache`.
FINETUNE_RAW_DATA: wins over `source` in `configs/raw_data.yaml`.
"""

import getpass
import os
from pathlib import Path

PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def configs() -> Path:
    return Path(os.environ.get("FINETUNE_CONFIGS") or PACKAGE_PARENT / "configs").expanduser().resolve()


def root() -> Path:
    """The project: what relative paths in settings are relative to."""
    return configs().parent


def store_url() -> str:
    return os.environ.get("FINETUNE_STORE") or f"file://{root()}/.finetune/store"


def namespace() -> str:
    return os.environ.get("FINETUNE_NAMESPACE") or getpass.getuser()


def cache() -> Path:
    return (root() / Path(os.environ.get("FINETUNE_CACHE") or ".finetune/cache").expanduser()).resolve()


def raw_data() -> str | None:
    return os.environ.get("FINETUNE_RAW_DATA")
