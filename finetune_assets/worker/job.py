"""What a launcher is asked to run: store references in, one artifact out."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_assets.config.cluster import Launcher
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ArtifactRef


class JobFailed(UserError):
    """The worker ended without an artifact. The text is the worker's own error.

    Args:
        text: That error.
        retriable: Whether the same job may succeed if it is run again.
        telling: How much it says of the cause; of machines that fail together, the most telling is heard.
    """

    def __init__(self, text: str, retriable: bool = False, telling: int = 0) -> None:
        super().__init__(text)
        self.retriable, self.telling = retriable, telling


@dataclass(frozen=True)
class JobSpec:
    """One worker's job, the same for every engine that runs it.

    Attributes:
        module: What to run, such as `finetune_assets.training`.
        config: The resolved configuration as YAML.
        inputs: Artifacts by name; the worker finds each as a folder given as `--name`.
        kind: Kind of the artifact that comes out.
        fingerprint: Its identity and name.
        made_from: What its manifest and provenance say about its origin.
        store: URL of the store.
        namespace: Namespace in the store.
        cache: Node-local folder.
        cache_limit: Most bytes of artifacts that it keeps; None for no limit.
        processes: torchrun processes on each node (`auto` or a number); None runs the module alone, without torchrun.
        nodes: Machines that work together, least and most.
        rendezvous_seconds: How long they wait for one another.
        replace: Publish over an artifact of that name.
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
    """Give the worker a folder (`--scratch`) that outlives it until a run of this fingerprint succeeds, and keep its
    checkpoints in the store meanwhile."""
    keep_checkpoints: int = 2
    """How many of them stay."""
    ignore_checkpoints: bool = False
    """Go on from no checkpoint."""

    settings: Launcher = field(default_factory=Launcher)
    """What is asked of a cluster. It stays with the launcher: the job is the same on every engine."""

    @property
    def makes(self) -> str:
        """Names what comes out, in which store: of two jobs of that name only one may go on."""
        store = hashlib.sha256(self.store.encode()).hexdigest()[:8]
        return f"{self.namespace}-{self.fingerprint[:32]}-{store}"

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if name != "settings"})


def from_json(text: str) -> JobSpec:
    """Read back what `JobSpec.to_json` wrote."""
    tree = json.loads(text)
    inputs = {name: ArtifactRef(**ref) for name, ref in tree["inputs"].items()}
    return JobSpec(**{**tree, "inputs": inputs, "nodes": tuple(tree["nodes"])})
