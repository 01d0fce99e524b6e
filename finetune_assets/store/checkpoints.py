"""Checkpoints of a training in the store, so that it can go on on another machine.

`checkpoints/<fingerprint>/<attempt>/step-N/`: every attempt at a training takes a number of its own when it begins, the
highest so far plus one. An attempt that sees a higher number has been given up by whoever started the other, and ends.
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
"""Folders of whole checkpoints; what is still written has another name."""
logger = logging.getLogger(__name__)


class Superseded(UserError):
    """Another attempt at this training has begun since."""


class Checkpoints:
    """Those of one attempt at a training.

    Args:
        store: Where they lie.
        fingerprint: Of the artifact that is trained.
        made_from: What their manifests say about their origin.
        local: Folder in which the training keeps them, newest last by name.
        keep: How many of them stay in the store.
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
        """See that no later attempt has begun.

        Raises:
            Superseded: if one has.
        """
        latest = max(self._attempts(), default=0)
        if latest > self.attempt:
            raise Superseded(
                f"{self.store.url}/{self.prefix}: attempt {self.attempt} was superseded by attempt {latest}; stopping "
                "without publishing"
            )

    def fetch_newest(self) -> None:
        """Put the newest checkpoint of any attempt into the local folder, unless there is as new a one already."""
        have = max((path.name for path in self.local.glob(STEPS)), default="")
        for step, name in sorted(self._stored(), reverse=True):
            if step <= have:
                return
            try:
                fetched = self.store.fetch(self.store.resolve(CHECKPOINTS, name, "lora_adapter"))
            except UserError as e:
                logger.warning("checkpoint %s cannot be fetched (%s); taking the one before", step, e)
                continue
            partial = self.local / f".{step}.{os.getpid()}"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(fetched, partial)
            partial.rename(self.local / step)
            return

    def _stored(self) -> list[tuple[str, str]]:
        """Step and name of every checkpoint, whoever made it."""
        keys = [stored.key for stored in self.store.objects.listing(self.prefix)]
        parts = [key.split("/")[-3:] for key in keys if key.endswith(f"/{MANIFEST}")]
        return [(step, f"{self.fingerprint}/{attempt}/{step}") for attempt, step, _ in parts]

    def publish_new(self) -> None:
        """Publish the newest local checkpoint, if it is not yet; that this fails is told, and ends no training.

        Raises:
            Superseded: if a later attempt has begun.
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
            logger.warning("checkpoint %s is not in the store: %s", newest.name, e)

    def give_up(self) -> None:
        """End an attempt that failed: if it published nothing, nothing is left of it."""
        if not self.published:
            self._remove(f"{self.prefix}/{self.attempt:06d}", numbers=True)

    def clear(self, numbers: bool = True) -> None:
        """Remove the checkpoints of all attempts, and free their numbers unless this one still goes on."""
        self._remove(self.prefix, numbers)

    def _remove(self, prefix: str, numbers: bool = False) -> None:
        """Manifests first: without its manifest nothing is taken for a checkpoint."""
        try:
            keys = [stored.key for stored in self.store.objects.listing(prefix)]
            self.store.objects.delete([key for key in keys if key.endswith(f"/{MANIFEST}")])
            rest = [key for key in keys if not key.endswith(f"/{MANIFEST}")]
            self.store.objects.delete([key for key in rest if numbers or not key.endswith(f"/{CLAIM}")])
        except (UserError, OSError) as e:
            logger.warning("%s is left for garbage collection: %s", prefix, e)
