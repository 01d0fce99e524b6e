"""Specification of a job for a launcher: references to input artifacts, and one output artifact.

FINETUNE_WORKER_MODULES: further modules that a job may run, separated by commas, for assets of your own.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_assets.artifacts.kinds import KINDS
from finetune_assets.config.cluster import LauncherSettings
from finetune_assets.errors import UserError
from finetune_assets.store.artifacts import ATTEMPT, NAME, ArtifactRef
from finetune_assets.store.manifest import SHA256, is_plain

MODULES = (
    "finetune_assets.training",
    "finetune_assets.evaluation",
    "finetune_assets.merging",
    "finetune_assets.merging.stacking",
)
"""Modules that a job may run, besides those in FINETUNE_WORKER_MODULES."""
INPUT = re.compile(
    "base-model|dataset|warm-start|reference|reference-log-probs|adapter|champion|champion-base-model|index|"
    "general-text|tasks|(?:raw|adapter)-[0-9]{1,4}"
)
"""Names of inputs: flags of the workers."""
FINGERPRINT = re.compile("[0-9A-Za-z]{1,64}")
STORE = re.compile(r"(?:file|s3)://[^\0]+")
PROCESSES = re.compile("auto|[1-9][0-9]{0,5}")
SHOWN_CHARACTERS = 200
"""Length of a value in an error message."""
AGAIN = "it was changed after the job was submitted, or written by another version; run the asset again"

REMEDIES = {
    "module": "use a worker of this project, or name your own in FINETUNE_WORKER_MODULES on the machines that run jobs"
}
"""What to do about an invalid value, by key, if not AGAIN."""


def modules() -> set[str]:
    """Return the modules that a job may run."""
    own = os.environ.get("FINETUNE_WORKER_MODULES", "").split(",")
    return {*MODULES, *(name.strip() for name in own if name.strip())}


class JobInvalid(UserError):
    """The specification of a job is not one that this project writes."""


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
    """Parse and validate the JSON written by `JobSpec.to_json`.

    Everyone with write access to the store can replace a job's specification, so nothing in it is trusted: a job runs a
    worker of this project, and its names lead neither out of the store nor out of the cache.

    Raises:
        JobInvalid: If the specification is incomplete, or has an unknown key or an invalid value.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise JobInvalid(f"job.json: not JSON ({e}); {AGAIN}") from e
    valid = _validated(tree, _VALID, "job.json")
    if unknown := next((name for name in valid["inputs"] if not INPUT.fullmatch(name)), None):
        raise JobInvalid(f"job.json: inputs: no worker has an input {shown(unknown)}; {AGAIN}")
    inputs = {name: ref_of(ref, f"job.json: inputs.{name}") for name, ref in valid["inputs"].items()}
    return JobSpec(**{**valid, "inputs": inputs, "nodes": tuple(valid["nodes"])})


def ref_of(tree: Any, where: str) -> ArtifactRef:
    """Validate a reference to an artifact in JSON.

    Args:
        tree: The reference.
        where: Its location, for error messages.

    Raises:
        JobInvalid: If the reference is incomplete, or has an unknown key or an invalid value.
    """
    return ArtifactRef(**_validated(tree, _VALID_REF, where))


def _validated(tree: Any, valid: Mapping[str, Callable[[Any], bool]], where: str) -> dict[str, Any]:
    """Return a JSON object that has exactly the keys of `valid`, each with a valid value.

    Raises:
        JobInvalid: If it is no object, a key is missing or unknown, or a value is invalid.
    """
    if not isinstance(tree, dict):
        raise JobInvalid(f"{where}: {shown(tree)} is not a JSON object; {AGAIN}")
    if unknown := next((key for key in tree if key not in valid), None):
        raise JobInvalid(f"{where}: unknown key {shown(unknown)}; {AGAIN}")
    for key, is_valid in valid.items():
        if key not in tree:
            raise JobInvalid(f"{where}: key '{key}' is missing; {AGAIN}")
        if not is_valid(tree[key]):
            raise JobInvalid(f"{where}: {key}: {shown(tree[key])} is not valid; {REMEDIES.get(key, AGAIN)}")
    return tree


def shown(value: Any) -> str:
    """Return the beginning of a value as printable ASCII."""
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0  # not a bool


def _is_count(value: Any) -> bool:
    return _is_size(value) and value > 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and bool(pattern.fullmatch(value))


def _is_range(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value)) and value[0] <= value[1]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_KINDS = {kind.folder for kind in KINDS}
_VALID: dict[str, Callable[[Any], bool]] = {
    "module": lambda value: _is_text(value) and value in modules(),
    "config": _is_text,
    "inputs": _is_object,
    "kind": lambda value: _is_text(value) and value in _KINDS,
    "fingerprint": _matches(FINGERPRINT),
    "made_from": _is_object,
    "store": _matches(STORE),
    "namespace": _matches(re.compile(NAME)),
    "cache": lambda value: _is_text(value) and bool(value),
    "cache_limit": lambda value: value is None or _is_size(value),
    "processes": lambda value: value is None or _matches(PROCESSES)(value),
    "nodes": _is_range,
    "rendezvous_seconds": _is_count,
    "replace": _is_flag,
    "scratch": _is_flag,
    "keep_checkpoints": _is_count,
    "ignore_checkpoints": _is_flag,
}
_VALID_REF: dict[str, Callable[[Any], bool]] = {
    "kind": _VALID["kind"],
    "name": lambda value: _is_text(value) and is_plain(value),
    "fingerprint": _is_text,
    "uri": lambda value: _is_text(value) and bool(ATTEMPT.fullmatch(value.rpartition("/")[2])),
    "files": _is_count,
    "size": _is_size,
    "content": lambda value: value == "" or _matches(SHA256)(value),
}
