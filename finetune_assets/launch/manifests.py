"""What Kubernetes is asked: a pod; for several machines an Indexed Job, whose pods find each other by name."""

import os
from collections.abc import Mapping
from typing import Any

from finetune_assets.config.cluster import Launcher
from finetune_assets.errors import UserError
from finetune_assets.worker.job import JobSpec
from finetune_assets.worker.remote import RemoteJob

JOB, ARTIFACT = "finetune/job", "finetune/artifact"
"""Labels: the job's id, and what it makes."""
QUEUE = "kueue.x-k8s.io/queue-name"
PORT = 29400
CACHE = "/cache"
GRACE_SECONDS = 120
"""For a last checkpoint, when a pod is told to end."""
KEEP_SECONDS = 3600
"""How long what nobody has deleted stays."""
PASSED_ON = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION", "FINETUNE_GPUS_PER_JOB")
"""Of this process's environment; what is secret goes by secrets or a service account."""


def labels(spec: JobSpec, remote: RemoteJob) -> dict[str, str]:
    queue = spec.settings.kubernetes.queue
    return {JOB: remote.id, ARTIFACT: spec.makes[-63:].lstrip("-_."), **({QUEUE: queue} if queue else {})}


def pod_spec(spec: JobSpec, remote: RemoteJob, **environment: Any) -> dict[str, Any]:
    """A pod's specification.

    Args:
        spec: The job.
        remote: Where it lies.
        environment: More variables: a value, or Kubernetes's `valueFrom`.

    Raises:
        UserError: if no image is named.
    """
    asked = spec.settings
    image = asked.kubernetes.image or os.environ.get("FINETUNE_IMAGE")
    if not image:
        raise UserError("launcher.kubernetes.image: name an image with this project in it, or set FINETUNE_IMAGE")
    passed = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    variables = {"FINETUNE_NODE_CACHE": CACHE, **passed, **asked.environment, **environment}
    container = {
        "name": "worker",
        "image": image,
        "command": ["python", "-m", "finetune_assets.worker.node", remote.store, remote.namespace, remote.id],
        "env": [_variable(name, value) for name, value in variables.items()],
        "envFrom": [{"secretRef": {"name": name}} for name in asked.kubernetes.secrets],
        "resources": _resources(asked),
        "volumeMounts": [{"name": "cache", "mountPath": CACHE}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    made = {
        "containers": [container],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "activeDeadlineSeconds": asked.seconds,
        "nodeSelector": dict(asked.kubernetes.node_selector),
        "tolerations": [dict(toleration) for toleration in asked.kubernetes.tolerations],
        "serviceAccountName": asked.kubernetes.service_account or os.environ.get("FINETUNE_SERVICE_ACCOUNT"),
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [
            {"name": "cache", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": asked.kubernetes.shared_memory}},
        ],
    }
    return merged({name: value for name, value in made.items() if value not in (None, {}, [])}, asked.kubernetes.pod)


def indexed_job(spec: JobSpec, remote: RemoteJob, messages: Mapping[str, str]) -> dict[str, Any]:
    """A Job of as many pods as the job may have machines; each knows its number.

    With a fixed number of machines, one that is lost ends all: Dagster begins anew, from the last checkpoint. Where
    fewer are enough, the others go on; it is not replaced, for torchrun's agents may wait for each other for ever where
    one comes back before they have missed it.
    """
    least, most = spec.nodes
    name = job_name(remote)
    pod = pod_spec(
        spec,
        remote,
        **messages,
        FINETUNE_HEAD=f"{name}-0.{name}:{PORT}",
        FINETUNE_MEETING=remote.id,
        FINETUNE_ADDRESS={"fieldRef": {"fieldPath": "status.podIP"}},
    )
    deadline = {"activeDeadlineSeconds": pod.pop("activeDeadlineSeconds")} if "activeDeadlineSeconds" in pod else {}
    known = labels(spec, remote)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": known},
        "spec": {
            "completions": most,
            "parallelism": most,
            "completionMode": "Indexed",
            **({"backoffLimitPerIndex": 0, "maxFailedIndexes": most - least} if least < most else {"backoffLimit": 0}),
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            **deadline,
            "template": {"metadata": {"labels": known}, "spec": {**pod, "subdomain": name}},
        },
    }


def headless_service(spec: JobSpec, remote: RemoteJob, owner: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gives each pod of a Job a name, before it is ready too. It goes with the Job that owns it."""
    owners = {"ownerReferences": [dict(owner)]} if owner else {}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job_name(remote), "labels": labels(spec, remote), **owners},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB: remote.id},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def job_name(remote: RemoteJob) -> str:
    return f"finetune-{remote.id}"


def _variable(name: str, value: Any) -> dict[str, Any]:
    return {"name": name, "valueFrom": value} if isinstance(value, dict) else {"name": name, "value": str(value)}


def _resources(asked: Launcher) -> dict[str, Any]:
    """Kubernetes gives GPUs whole, and memory as is asked for: what is used beyond it ends the pod."""
    memory = f"{asked.memory}i" if asked.memory else None
    gpus = {"nvidia.com/gpu": str(asked.gpus_per_node)} if asked.gpus_per_node else {}
    cpus = {"cpu": str(asked.cpus_per_node)} if asked.cpus_per_node else {}
    limits = {**gpus, **({"memory": memory} if memory else {})}
    requests = {**limits, **cpus}
    return {name: part for name, part in (("requests", requests), ("limits", limits)) if part}


def merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings key by key; of lists of things with names, those of the same name."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {**base, **{key: merged(base[key], value) if key in base else value for key, value in over.items()}}
    if _named(base) and _named(over):
        laid = {one["name"]: one for one in base}
        for one in over:
            laid[one["name"]] = merged(laid.get(one["name"], {}), one)
        return list(laid.values())
    return over


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "name" in one for one in value)
