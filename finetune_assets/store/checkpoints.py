"""Training checkpoints in the store, so that a run can resume on another machine.

Key layout: `checkpoints/<fingerprint>/<attempt>/step-N/`. Every attempt at a training run claims a number when it
starts, the highest so far plus one. An attempt that finds a higher number has been superseded and stops.
"""

import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import CHECKPOINTS, CLAIM, MANIFEST, ArtifactStore

STEPS = "step-*"
"""Folders of complete checkpoints; a checkpoint that is still being written has another name."""
logger = logging.getLogger(__name__)


class Superseded(UserError):
    """A later attempt at the same training run has started."""


class Checkpoints:
    """Checkpoints of one attempt at a training run.

    Args:
        store: Store that the checkpoints are published to.
        fingerprint: Fingerprint of the artifact being trained.
        made_from: Provenance recorded in the manifests.
        local: Local folder of checkpoints, newest last by name.
        keep: Number of checkpoints to keep in the store.
    """

    def __init__(
        self, store: ArtifactStore, fingerprint: str, made_from: Mapping[str, Any], local: Path, keep: int
    ) -> None:
        self.store, self.fingerprint, self.made_from = store, fingerprint, dict(made_from)
        self.local, self.keep = local, keep
        self.prefix = store.prefix(CHECKPOINTS, fingerprint)
        self.published: list[str] = []
        self.attempt = self._claim()

    def _claim(self) -> int:
        who = {"host": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex}
        while True:
            number = max(self._attempts(), default=0) + 1
            if self.store.objects.create(f"{self.prefix}/{number:06d}/{CLAIM}", json.dumps(who).encode()):
                return number

    def _attempts(self) -> list[int]:
        keys = [stored.key for stored in self.store.objects.listing(self.prefix)]
        return [int(key.split("/")[-2]) for key in keys if key.endswith(f"/{CLAIM}")]

    def check_current(self) -> None:
        """Check that this attempt is the latest.

        Raises:
            Superseded: If a later attempt has started.
        """
        latest = max(self._attempts(), default=0)
        if latest > self.attempt:
            raise Superseded(
                f"{self.store.url}/{self.prefix}: attempt {self.attempt} was superseded by attempt {latest}; stopping "
                "without publishing"
            )

    def fetch_newest(self) -> None:
        """Fetch the newest checkpoint of any attempt, unless the local folder has one at least as new."""
        have = max((path.name for path in self.local.glob(STEPS)), default="")
        for step, name in sorted(self._stored(), reverse=True):
            if step <= have:
                return
            try:
                fetched = self.store.fetch(self.store.resolve(CHECKPOINTS, name, "lora_adapter"))
            except UserError as e:
                logger.warning("Cannot fetch checkpoint %s (%s); falling back to the previous one", step, e)
                continue
            partial = self.local / f".{step}.{os.getpid()}"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(fetched, partial)
            partial.rename(self.local / step)
            return

    def _stored(self) -> list[tuple[str, str]]:
        """Return step and name of every checkpoint in the store, of all attempts."""
        keys = [stored.key for stored in self.store.objects.listing(self.prefix)]
        parts = [key.split("/")[-3:] for key in keys if key.endswith(f"/{MANIFEST}")]
        return [(step, f"{self.fingerprint}/{attempt}/{step}") for attempt, step, _ in parts]

    def publish_new(self) -> None:
        """Publish the newest local checkpoint if it is not published yet.

        Failures are logged; they do not stop the training run.

        Raises:
            Superseded: If a later attempt has started.
        """
        newest = max(self.local.glob(STEPS), default=None)
        if newest is None or newest.name in self.published:
            return
        try:
            self.check_current()
            name = f"{self.fingerprint}/{self.attempt:06d}/{newest.name}"
            self.store.publish(newest, CHECKPOINTS, name, name, self.made_from)
            self.published.append(newest.name)
            for old in self.published[: -self.keep]:
                self._remove(f"{self.prefix}/{self.attempt:06d}/{old}")
                self.published.remove(old)
        except Superseded:
            raise
        except (UserError, OSError) as e:
            logger.warning("Checkpoint %s not published: %s", newest.name, e)

    def give_up(self) -> None:
        """Release the number of a failed attempt that has published no checkpoint."""
        if not self.published:
            self._remove(f"{self.prefix}/{self.attempt:06d}", numbers=True)

    def clear(self, numbers: bool = True) -> None:
        """Delete the checkpoints of all attempts.

        Args:
            numbers: Also free the numbers of all attempts. Must be False while this attempt continues.
        """
        self._remove(self.prefix, numbers)

    def _remove(self, prefix: str, numbers: bool = False) -> None:
        """Delete manifests first: a folder without a manifest is not a checkpoint."""
        try:
            keys = [stored.key for stored in self.store.objects.listing(prefix)]
            self.store.objects.delete([key for key in keys if key.endswith(f"/{MANIFEST}")])
            rest = [key for key in keys if not key.endswith(f"/{MANIFEST}")]
            self.store.objects.delete([key for key in rest if numbers or not key.endswith(f"/{CLAIM}")])
        except (UserError, OSError) as e:
            logger.warning("Cannot delete %s, leaving it for garbage collection: %s", prefix, e)
