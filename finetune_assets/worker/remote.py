"""A job on other machines. Its specification and its outcome are stored in the artifact store, which all can reach."""

import hashlib
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
from finetune_assets.worker.job import JobFailed, JobInvalid, JobSpec, from_json, ref_of, shown

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
        digest: sha256 of the job's specification, which the engine passes to each machine on the command line. It
            cannot be changed by writing to the store.
        connect: Returns a boto3 S3 client.
    """

    store: str
    namespace: str
    id: str
    digest: str = ""
    connect: Callable[[], Any] = boto3_client

    @classmethod
    def begin(cls, spec: JobSpec) -> "RemoteJob":
        """Write the job's specification to the store, where its machines read it."""
        content = spec.to_json().encode()
        job_id, digest = f"{spec.fingerprint[:16]}-{uuid.uuid4().hex[:8]}", hashlib.sha256(content).hexdigest()
        job = cls(spec.store, spec.namespace, job_id, digest)
        job.objects.put(f"{job.prefix}/job.json", content)
        return job

    @property
    def arguments(self) -> tuple[str, str, str, str]:
        """Arguments of `finetune_assets.worker.node` on each machine."""
        return self.store, self.namespace, self.id, self.digest

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
            JobInvalid: If the specification was changed since it was submitted, or is invalid.
        """
        content = self.objects.get(f"{self.prefix}/job.json")
        if (digest := hashlib.sha256(content).hexdigest()) != self.digest:
            raise JobInvalid(
                f"{self.store}/{self.prefix}/job.json: changed after the job was submitted (sha256 {digest}, expected "
                f"'{self.digest}'); check who may write to the store, then run the asset again"
            )
        return from_json(content.decode(errors="replace"))

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
        answers = [_answer(self.objects.get(key), f"{self.store}/{key}") for key in keys if "/answer-" in key]
        ref = next((answer["ref"] for answer in answers if answer.get("ref")), None)
        if ref:
            return ref_of(ref, f"{self.store}/{self.prefix}: ref")
        failures = [answer for answer in answers if "error" in answer]
        if not failures:
            return None
        first = min(failures, key=lambda answer: (-answer["specificity"], answer["when"]))
        return JobFailed(first["error"], first["retriable"], first["specificity"])

    def end(self) -> None:
        """Delete the job from the store once the launcher no longer waits for it."""
        self.objects.delete([stored.key for stored in self.objects.listing(self.prefix)])


def _answer(content: bytes, where: str) -> dict[str, Any]:
    """Parse the outcome that a machine reported.

    Raises:
        JobInvalid: If it is not one that `RemoteJob.answer` writes.
    """
    types = {"ref": dict, "error": str, "retriable": bool, "specificity": int, "when": float}
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise JobInvalid(f"{where}: not JSON ({e}); run the asset again") from e
    known = isinstance(answer, dict) and all(
        isinstance(value, types.get(key, ())) or (key == "ref" and value is None) for key, value in answer.items()
    )
    if not known or ("error" in answer and not types.keys() - {"ref"} <= answer.keys()):
        raise JobInvalid(f"{where}: {shown(answer)} is not the outcome of a job; run the asset again")
    return dict(answer)
