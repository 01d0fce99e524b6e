"""A folder of adapters in the layout of vLLM's `lora_filesystem_resolver`: FOLDER/NAME/adapter_config.json and so on.

A server finds an adapter there by its name, once it is asked for it. Each adapter is written whole into a hidden folder
and renamed, so that no server reads half of one. The alias is FOLDER/EXPERIMENT.json, a small file that is replaced: a
folder of the experiment's own name would get new bytes under an old name, which servers answer from their caches.
"""

import json
import shutil
import uuid
from pathlib import Path

from finetune_assets.errors import UserError
from finetune_assets.serving.gateway import manifests
from finetune_assets.serving.state import Served
from finetune_assets.store.hashing import sha256

PARTIAL = ".partial-"
"""Beginning of the names of folders that are being written or removed."""


class ServingFolder:
    """A folder that holds adapters for servers.

    Args:
        path: The folder; it is created when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def shown(self) -> str:
        return f"folder:{self.path}"

    def at(self, name: str) -> Path:
        """Absolute path of an adapter's folder."""
        return self.path.resolve() / name

    def load(self, name: str, copy: Path) -> None:
        """Copy an adapter's files into the folder of its name, unless it is there.

        Args:
            name: Name of the adapter; it never gets other bytes.
            copy: The files.

        Raises:
            UserError: if the folder of this name has other files.
        """
        target = self.path / name
        if target.exists() or target.is_symlink():
            self._check(target, copy)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            partial.mkdir()
            for file in sorted(copy.iterdir()):
                shutil.copyfile(file, partial / file.name)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if not target.is_dir():
                raise
            self._check(target, copy)  # another run was faster

    def _check(self, target: Path, copy: Path) -> None:
        if target.is_symlink() or _hashes(target) != _hashes(copy):
            raise UserError(
                f"{target} has other files than the adapter of this name; another program wrote them. Move the folder "
                "away and materialize served_adapter again"
            )

    def names(self) -> list[str]:
        """Names of the adapters in the folder."""
        found = (path.parent.name for path in self.path.glob("*/adapter_config.json"))
        return sorted(name for name in found if not name.startswith(PARTIAL))

    def unload(self, name: str) -> None:
        """Remove an adapter; a server that has loaded it keeps it in memory."""
        target = self.path / name
        if not target.is_dir() or target.is_symlink():
            return
        gone = self.path / f"{PARTIAL}{uuid.uuid4().hex}"
        target.rename(gone)
        shutil.rmtree(gone)

    def write_alias(self, record: Served) -> None:
        """Replace the experiment's alias, and the manifests for a gateway that holds it."""
        alias = {
            "serves": record.name,
            "previous": record.previous,
            "adapter": record.adapter,
            "record": record.number,
            "at": record.at,
        }
        self._replace(f"{record.experiment}.json", json.dumps(alias, indent=1))
        for name, text in manifests(record).items():
            self._replace(name, text)

    def _replace(self, name: str, text: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{PARTIAL}{uuid.uuid4().hex}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
