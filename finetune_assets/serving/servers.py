"""The servers of an experiment, from its settings."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from finetune_assets.config.schema import ExperimentConfig, Serving
from finetune_assets.config.serving_validation import FOLDER
from finetune_assets.serving.folders import ServingFolder
from finetune_assets.serving.vllm import TOKEN_VARIABLE, VllmServer

DEFAULT_FOLDER = Path(".finetune/serving")
"""Folder that vLLM servers load from if the settings name none, in the project."""


class Server(Protocol):
    """Where adapters are served: a folder, or a replica of a vLLM server."""

    @property
    def shown(self) -> str:
        """Its address, without credentials."""

    def names(self) -> list[str]:
        """Names of the adapters that it has."""

    def load(self, name: str, copy: Path) -> None:
        """Add an adapter, whose files are in the folder `copy`."""

    def unload(self, name: str) -> None:
        """Remove an adapter; nothing happens if it is not there."""


@dataclass(frozen=True)
class Servers:
    """Where the adapters of one experiment are served.

    Attributes:
        folders: Folders of adapters. vLLM servers load from the first one, and must see it under the same path.
        replicas: vLLM servers.
        settings: The settings, with the name of the base model.
    """

    folders: list[ServingFolder]
    replicas: list[VllmServer]
    settings: Serving

    @property
    def every(self) -> list[Server]:
        """Replicas, and then the folders that they load from."""
        return [*self.replicas, *self.folders]

    @property
    def shown(self) -> list[str]:
        """Addresses of the servers, without credentials."""
        return [server.shown for server in self.every]


def servers_of(config: ExperimentConfig, root: Path, seconds: float | None = None) -> Servers | None:
    """The servers of an experiment; None without the group `serving`.

    Args:
        config: Settings of the experiment.
        root: Folder that relative paths start from.
        seconds: Time limit of one answer, of which only one attempt is made; by default that of `vllm.py`.
    """
    if config.serving is None:
        return None
    settings = replace(config.serving, base_name=config.serving.base_name or config.model.base_model)
    token = os.environ.get(TOKEN_VARIABLE) or None
    paths = [Path(name.removeprefix(FOLDER)).expanduser() for name in settings.servers if name.startswith(FOLDER)]
    folders = [ServingFolder(root / path) for path in paths or [DEFAULT_FOLDER]]
    replicas = [VllmServer(name, token, seconds) for name in settings.servers if not name.startswith(FOLDER)]
    return Servers(folders, replicas, settings)
