"""A job on other machines: what it is asked and what became of it lie in the store, which all of them reach."""

import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import JOBS, ArtifactRef
from finetune_assets.store.objects import Objects, boto3_client
from finetune_assets.worker.job import JobFailed, JobSpec, from_json

TOLD_TO_END = {"error": "the job was told to end", "retriable": True, "telling": -1}
"""What a machine answers that its engine takes away; why, the engine knows."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteJob:
    """`<namespace>/jobs/<id>/` in the store.

    Attributes:
        store: URL of the store.
        namespace: Namespace in it.
        id: The job's.
    """

    store: str
    namespace: str
    id: str
    connect: Callable[[], Any] = boto3_client

    @classmethod
    def begin(cls, spec: JobSpec) -> "RemoteJob":
        """Put a job where its machines find it."""
        job = cls(spec.store, spec.namespace, f"{spec.fingerprint[:16]}-{uuid.uuid4().hex[:8]}")
        job.objects.put(f"{job.prefix}/job.json", spec.to_json().encode())
        return job

    @cached_property
    def objects(self) -> Objects:
        return Objects(self.store, self.connect)

    @property
    def prefix(self) -> str:
        return f"{self.namespace}/{JOBS}/{self.id}"

    def spec(self) -> JobSpec:
        """What a machine is asked.

        Raises:
            FileNotFoundError: if nobody waits for it any more.
        """
        return from_json(self.objects.get(f"{self.prefix}/job.json").decode())

    def answer(self, node: int, answer: dict[str, Any]) -> None:
        """Tell what became of a machine's part."""
        self.objects.put(f"{self.prefix}/answer-{node}.json", json.dumps({**answer, "when": time.time()}).encode())

    def has_ended(self) -> bool:
        """Whether the machine that leads is known to have answered; a store that is away for a while ends no job."""
        with suppress(UserError):
            return any(stored.key.endswith("/answer-0.json") for stored in self.objects.listing(self.prefix))
        return False

    def outcome(self) -> ArtifactRef | JobFailed | None:
        """What the machines say; None if none of them has said anything that counts."""
        keys = [stored.key for stored in self.objects.listing(self.prefix)]
        answers = [json.loads(self.objects.get(key)) for key in keys if "/answer-" in key]
        made = next((answer["ref"] for answer in answers if answer.get("ref")), None)
        if made:
            return ArtifactRef(**made)
        failures = [answer for answer in answers if "error" in answer]
        if not failures:
            return None
        first = min(failures, key=lambda answer: (-answer["telling"], answer["when"]))
        return JobFailed(first["error"], first["retriable"], first["telling"])

    def end(self) -> None:
        """Nobody waits for it any more."""
        self.objects.delete([stored.key for stored in self.objects.listing(self.prefix)])
