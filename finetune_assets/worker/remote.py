"""A job on other machines. Its specification and its outcome are stored in the artifact store, which all can reach."""

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
from finetune_assets.store.objects import ObjectStorage, boto3_client
from finetune_assets.worker.job import JobFailed, JobSpec, from_json

TERMINATED = {"error": "Job terminated (SIGTERM)", "retriable": True, "specificity": -1}
"""Outcome reported by a machine that its engine terminates. The reason is known to the engine."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteJob:
    """A job stored at `<namespace>/jobs/<id>/` in the artifact store.

    Attributes:
        store: URL of the store.
        namespace: Namespace in the store.
        id: Identifier of the job.
        connect: Returns a boto3 S3 client.
    """

    store: str
    namespace: str
    id: str
    connect: Callable[[], Any] = boto3_client

    @classmethod
    def begin(cls, spec: JobSpec) -> "RemoteJob":
        """Write the job's specification to the store, where its machines read it."""
        job = cls(spec.store, spec.namespace, f"{spec.fingerprint[:16]}-{uuid.uuid4().hex[:8]}")
        job.objects.put(f"{job.prefix}/job.json", spec.to_json().encode())
        return job

    @cached_property
    def objects(self) -> ObjectStorage:
        return ObjectStorage(self.store, self.connect)

    @property
    def prefix(self) -> str:
        return f"{self.namespace}/{JOBS}/{self.id}"

    def spec(self) -> JobSpec:
        """Read the job's specification.

        Raises:
            FileNotFoundError: If the launcher no longer waits for the job.
        """
        return from_json(self.objects.get(f"{self.prefix}/job.json").decode())

    def answer(self, node: int, answer: dict[str, Any]) -> None:
        """Write the outcome of a machine's part of the job."""
        self.objects.put(f"{self.prefix}/answer-{node}.json", json.dumps({**answer, "when": time.time()}).encode())

    def has_ended(self) -> bool:
        """Whether the leader has written its outcome. False while the store is temporarily unavailable."""
        with suppress(UserError):
            return any(stored.key.endswith("/answer-0.json") for stored in self.objects.listing(self.prefix))
        return False

    def outcome(self) -> ArtifactRef | JobFailed | None:
        """Return the artifact or the most specific error that the machines report; None without either."""
        keys = [stored.key for stored in self.objects.listing(self.prefix)]
        answers = [json.loads(self.objects.get(key)) for key in keys if "/answer-" in key]
        ref = next((answer["ref"] for answer in answers if answer.get("ref")), None)
        if ref:
            return ArtifactRef(**ref)
        failures = [answer for answer in answers if "error" in answer]
        if not failures:
            return None
        first = min(failures, key=lambda answer: (-answer["specificity"], answer["when"]))
        return JobFailed(first["error"], first["retriable"], first["specificity"])

    def end(self) -> None:
        """Delete the job from the store once the launcher no longer waits for it."""
        self.objects.delete([stored.key for stored in self.objects.listing(self.prefix)])
