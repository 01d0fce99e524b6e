"""Kubernetes manifests: a pod, or for several machines an Indexed Job with a headless service and a network policy."""

import os
from collections.abc import Mapping
from typing import Any

from finetune_assets.config.cluster import LauncherSettings
from finetune_assets.errors import UserError
from finetune_assets.worker.job import JobSpec
from finetune_assets.worker.remote import RemoteJob

JOB, ARTIFACT = "finetune/job", "finetune/artifact"
"""Label keys: id of the job, and name of the artifact that it creates."""
QUEUE = "kueue.x-k8s.io/queue-name"
PORT = 29400
CACHE = "/cache"
GRACE_SECONDS = 120
"""Time that a terminated pod gets to save a last checkpoint, in seconds."""
KEEP_SECONDS = 3600
"""Time after which Kubernetes deletes a finished Job that the launcher did not delete, in seconds."""
PASSED_ON = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION"),
    *("FINETUNE_GPUS_PER_JOB", "FINETUNE_WORKER_MODULES", "FINETUNE_GROUP_ACCESS"),
)
"""Environment variables that are copied to the pod. Credentials are passed through secrets or a service account."""


def labels(spec: JobSpec, remote: RemoteJob) -> dict[str, str]:
    """Return the labels of a job's Kubernetes objects, including the Kueue queue if one is set."""
    queue = spec.settings.kubernetes.queue
    return {JOB: remote.id, ARTIFACT: spec.makes[-63:].lstrip("-_."), **({QUEUE: queue} if queue else {})}


def pod_spec(spec: JobSpec, remote: RemoteJob, **environment: Any) -> dict[str, Any]:
    """Build the specification of a pod that runs the job.

    Args:
        spec: The job.
        remote: Location of the job in the store.
        environment: Additional environment variables: a value, or a `valueFrom` mapping in Kubernetes' format.

    Raises:
        UserError: if no image is set.
    """
    settings = spec.settings
    image = settings.kubernetes.image or os.environ.get("FINETUNE_IMAGE")
    if not image:
        raise UserError(
            "launcher.kubernetes.image: no image is set; name one that contains this project, or set FINETUNE_IMAGE"
        )
    passed = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    variables = {"FINETUNE_NODE_CACHE": CACHE, **passed, **settings.environment, **environment}
    container = {
        "name": "worker",
        "image": image,
        "command": ["python", "-m", "finetune_assets.worker.node", *remote.arguments],
        "env": [_variable(name, value) for name, value in variables.items()],
        "envFrom": [{"secretRef": {"name": name}} for name in settings.kubernetes.secrets],
        "resources": _resources(settings),
        "volumeMounts": [{"name": "cache", "mountPath": CACHE}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    specification = {
        "containers": [container],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "activeDeadlineSeconds": settings.seconds,
        "nodeSelector": dict(settings.kubernetes.node_selector),
        "tolerations": [dict(toleration) for toleration in settings.kubernetes.tolerations],
        "serviceAccountName": settings.kubernetes.service_account or os.environ.get("FINETUNE_SERVICE_ACCOUNT"),
        # A job needs no access to the API server, and runs the code of models. Roles of clouds bring their own token
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [
            {"name": "cache", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.kubernetes.shared_memory}},
        ],
    }
    given = {name: value for name, value in specification.items() if value not in (None, {}, [])}
    return merged(given, settings.kubernetes.pod)


def indexed_job(spec: JobSpec, remote: RemoteJob, messages: Mapping[str, str]) -> dict[str, Any]:
    """Build an Indexed Job with one pod for each of the maximum number of machines.

    With a fixed number of machines, losing one fails the Job, and Dagster retries the step from the last checkpoint.
    With a range of machines, the others continue and the lost pod is not replaced: torchrun's agents may wait for each
    other indefinitely if a pod returns before the others notice its loss.
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
    job_labels = labels(spec, remote)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": job_labels},
        "spec": {
            "completions": most,
            "parallelism": most,
            "completionMode": "Indexed",
            **({"backoffLimitPerIndex": 0, "maxFailedIndexes": most - least} if least < most else {"backoffLimit": 0}),
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            **deadline,
            "template": {"metadata": {"labels": job_labels}, "spec": {**pod, "subdomain": name}},
        },
    }


def headless_service(spec: JobSpec, remote: RemoteJob, owner: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Build the service that gives each pod of a Job a DNS name, also before the pod is ready.

    Args:
        spec: The job.
        remote: Location of the job in the store.
        owner: Owner reference to the Job; Kubernetes deletes the service together with its owner.
    """
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


def network_policy(spec: JobSpec, remote: RemoteJob) -> dict[str, Any]:
    """Build the policy that lets only the pods of a Job connect to one another.

    torchrun's store and the ranks do not authenticate connections, and torchrun unpickles what is in its store.
    The ports of the ranks are chosen when they start, so the policy names none.
    """
    pods = {"podSelector": {"matchLabels": {JOB: remote.id}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": job_name(remote), "labels": labels(spec, remote)},
        "spec": {**pods, "policyTypes": ["Ingress"], "ingress": [{"from": [pods]}]},
    }


def job_name(remote: RemoteJob) -> str:
    """Return the name of the Job, of its headless service and of its network policy."""
    return f"finetune-{remote.id}"


def _variable(name: str, value: Any) -> dict[str, Any]:
    return {"name": name, "valueFrom": value} if isinstance(value, dict) else {"name": name, "value": str(value)}


def _resources(settings: LauncherSettings) -> dict[str, Any]:
    """Build resource requests and limits: whole GPUs, and memory with a limit above which the pod is killed."""
    memory = f"{settings.memory}i" if settings.memory else None
    gpus = {"nvidia.com/gpu": str(settings.gpus_per_node)} if settings.gpus_per_node else {}
    cpus = {"cpu": str(settings.cpus_per_node)} if settings.cpus_per_node else {}
    limits = {**gpus, **({"memory": memory} if memory else {})}
    requests = {**limits, **cpus}
    return {name: part for name, part in (("requests", requests), ("limits", limits)) if part}


def merged(base: Any, over: Any) -> Any:
    """Merge `over` into `base`: mappings key by key, lists of named items by `name`; other values are replaced."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        return {**base, **{key: merged(base[key], value) if key in base else value for key, value in over.items()}}
    if _is_named_list(base) and _is_named_list(over):
        by_name = {item["name"]: item for item in base}
        for item in over:
            by_name[item["name"]] = merged(by_name.get(item["name"], {}), item)
        return list(by_name.values())
    return over


def _is_named_list(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, Mapping) and "name" in item for item in value)
