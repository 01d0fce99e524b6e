"""Specification of a job for a launcher: references to input artifacts, and one output artifact."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_assets.config.cluster import LauncherSettings
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ArtifactRef


class JobFailed(UserError):
    """The worker ended without an artifact.

    Args:
        text: The worker's own error.
        retriable: Whether the same job may succeed on a retry.
        specificity: How specific the error is about the cause. If several machines fail, the most specific error is
            reported.
    """

    def __init__(self, text: str, retriable: bool = False, specificity: int = 0) -> None:
        super().__init__(text)
        self.retriable, self.specificity = retriable, specificity


@dataclass(frozen=True)
class JobSpec:
    """Specification of one worker's job, independent of the engine that runs it.

    Attributes:
        module: Module to run, such as `finetune_assets.training`.
        config: The resolved configuration as YAML.
        inputs: Input artifacts by name; the worker receives each as a folder in the flag `--name`.
        kind: Kind of the output artifact.
        fingerprint: Identity and name of the output artifact.
        made_from: Provenance recorded in the manifest of the output artifact.
        store: URL of the store.
        namespace: Namespace in the store.
        cache: Node-local cache folder.
        cache_limit: Maximum size of the cached artifacts in bytes; None for no limit.
        processes: torchrun processes on each node (`auto` or a number); None runs the module without torchrun.
        nodes: Minimum and maximum number of machines.
        rendezvous_seconds: How long the machines wait for one another.
        replace: Replace an existing artifact with this name.
    """

    module: str
    config: str
    inputs: dict[str, ArtifactRef]
    kind: str
    fingerprint: str
    made_from: dict[str, Any]
    store: str
    namespace: str
    cache: str
    cache_limit: int | None = None
    processes: str | None = None
    nodes: tuple[int, int] = (1, 1)
    rendezvous_seconds: int = 600
    replace: bool = False
    scratch: bool = field(default=False)
    """Give the worker a folder (`--scratch`) that is kept until a run of this fingerprint succeeds, and keep its
    checkpoints in the store until then."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep in the store."""
    ignore_checkpoints: bool = False
    """Start from the beginning and delete existing checkpoints."""

    settings: LauncherSettings = field(default_factory=LauncherSettings)
    """Cluster settings for the launcher. They are not sent with the job, which is the same on every engine."""

    @property
    def makes(self) -> str:
        """Name of the output and its store. Of two jobs with the same name, only one may run at a time."""
        store = hashlib.sha256(self.store.encode()).hexdigest()[:8]
        return f"{self.namespace}-{self.fingerprint[:32]}-{store}"

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if name != "settings"})


def from_json(text: str) -> JobSpec:
    """Parse the JSON written by `JobSpec.to_json`."""
    tree = json.loads(text)
    inputs = {name: ArtifactRef(**ref) for name, ref in tree["inputs"].items()}
    return JobSpec(**{**tree, "inputs": inputs, "nodes": tuple(tree["nodes"])})
