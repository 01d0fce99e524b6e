"""Run jobs on Kubernetes: on one machine with the Pipes client of dagster-k8s, on several as an Indexed Job.

FINETUNE_IMAGE, FINETUNE_KUBERNETES_NAMESPACE, FINETUNE_SERVICE_ACCOUNT: defaults for experiments that do not set them.

Like dagster-k8s, this module uses the cluster that this process runs in, or else the current context of KUBECONFIG.
`pip install finetune-assets[kubernetes]` installs the clients.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from finetune_assets.errors import UserError
from finetune_assets.launch.manifests import (
    ARTIFACT,
    JOB,
    headless_service,
    indexed_job,
    job_name,
    labels,
    network_policy,
    pod_spec,
)
from finetune_assets.launch.pods import completion_index, deadline_exceeded, described, failure_of
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.worker.job import JobFailed, JobSpec
from finetune_assets.worker.remote import RemoteJob

POLL_SECONDS = 5.0
SILENT_SECONDS = 600
"""Time for which the API server may be unavailable, in seconds."""
DELETE_SECONDS = 150
"""Time for deleted pods to terminate, in seconds: their grace period plus a margin."""
NOTICE_SECONDS = 30
"""Time for the Pipes client to notice that a pod has failed, in seconds."""
logger = logging.getLogger(__name__)


class KubernetesEngine:
    """Submits jobs to the API server and monitors them. Terminating this process deletes the job."""

    is_remote = True

    def run(self, spec: JobSpec, environment: Mapping[str, str]) -> ArtifactRef:
        """Run a job on several machines and wait for its artifact.

        Args:
            spec: The job.
            environment: Additional environment variables of the pods, such as the bootstrap variables of Dagster Pipes.

        Raises:
            JobFailed: with the worker's own error, or with what Kubernetes did to it.
            UserError: if Kubernetes does not take it.
        """
        with _remote_job(spec) as (cluster, remote):
            try:
                cluster.create(spec, remote, indexed_job(spec, remote, environment))
            except Exception as e:
                raise _api_failure(e) from e
            with cluster.output(remote):
                failure = cluster.wait(remote, elastic=spec.nodes[0] < spec.nodes[1])
            return _outcome(remote, failure)

    def run_pod(self, spec: JobSpec, follow: Callable[..., Any]) -> ArtifactRef:
        """Run a job in one pod and wait for its artifact.

        Args:
            spec: The job.
            follow: Starts the pod with the given `namespace`, `base_pod_meta` and `base_pod_spec`, forwards its
                messages and waits for its end. It runs in a thread while this method monitors the pod:
                dagster-k8s's client waits silently, for up to a day, for a pod that can never start.

        Raises:
            JobFailed: with the worker's own error, or with what Kubernetes did to it.
            UserError: if Kubernetes does not take it.
        """
        with _remote_job(spec) as (cluster, remote):
            pod_arguments = {
                "namespace": cluster.namespace,
                "base_pod_meta": {"labels": labels(spec, remote)},
                "base_pod_spec": pod_spec(spec, remote),
            }
            followed = _BackgroundTask(lambda: follow(**pod_arguments))
            failure, since = None, 0.0
            while not followed.ended(POLL_SECONDS) or cluster.goes_on(remote):
                current = cluster.failure(remote)
                failure, since = current, since if failure else time.monotonic()
                if failure and (failure.specificity or time.monotonic() - since > NOTICE_SECONDS):
                    break
            failure = failure or cluster.failure(remote)
            return _outcome(remote, failure or (_api_failure(followed.error) if followed.error else None))


class _BackgroundTask:
    """Runs a function in a daemon thread, which is abandoned when its result is no longer needed."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.error: Exception | None = None
        self._was_checked = False
        self._thread = threading.Thread(target=self._run, args=(do,), daemon=True)
        self._thread.start()

    def _run(self, do: Callable[[], Any]) -> None:
        try:
            do()
        except Exception as e:
            self.error = e

    def ended(self, seconds: float) -> bool:
        """Wait for at most `seconds` and return whether the function has ended."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        else:
            time.sleep(seconds if self._was_checked else 0)
        self._was_checked = True
        return not self._thread.is_alive()


@contextmanager
def _remote_job(spec: JobSpec) -> Iterator[tuple["Cluster", RemoteJob]]:
    namespace = spec.settings.kubernetes.namespace or os.environ.get("FINETUNE_KUBERNETES_NAMESPACE")
    cluster = Cluster(namespace or "default")
    remote = RemoteJob.begin(spec)
    try:
        cluster.end_former(labels(spec, remote)[ARTIFACT])
        try:
            yield cluster, remote
        finally:
            cluster.delete(f"{JOB}={remote.id}")
    finally:
        remote.end()


def _outcome(remote: RemoteJob, failure: JobFailed | None) -> ArtifactRef:
    outcome = remote.outcome()
    if isinstance(outcome, ArtifactRef):
        return outcome
    if failure and (failure.specificity or (outcome and outcome.specificity < 0)):
        raise failure
    raise (
        outcome
        or failure
        or JobFailed(f"job {remote.id} ended without publishing an artifact; check its output", retriable=True)
    )


def _api_failure(error: BaseException) -> JobFailed:
    """Convert an error of the API server or its client."""
    status, reason = getattr(error, "status", None), getattr(error, "reason", None)
    if status is None:
        return JobFailed(f"Kubernetes: {error}", retriable=True)
    body = " ".join(str(getattr(error, "body", "") or "").split())
    return JobFailed(f"Kubernetes rejected the job ({status} {reason}): {body[:500]}", retriable=status >= 500)


class Cluster:
    """Client of the API server for the objects of jobs.

    Args:
        namespace: Namespace of the pods.

    Raises:
        UserError: if the client is not installed or has no cluster configuration.
    """

    def __init__(self, namespace: str) -> None:
        try:
            import kubernetes  # type: ignore[import-untyped]
            import urllib3
        except ImportError as e:
            raise UserError(
                "launcher.engine: 'kubernetes' requires the Kubernetes clients; run: "
                "pip install 'finetune-assets[kubernetes]'"
            ) from e
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                kubernetes.config.load_incluster_config()
            else:
                kubernetes.config.load_kube_config()
        except kubernetes.config.ConfigException as e:
            raise UserError(f"launcher.engine: 'kubernetes' has no cluster configuration ({e}); set KUBECONFIG") from e
        self.namespace = namespace
        self.core, self.batch = kubernetes.client.CoreV1Api(), kubernetes.client.BatchV1Api()
        self.networking = kubernetes.client.NetworkingV1Api()
        self._api_errors = (kubernetes.client.ApiException, urllib3.exceptions.HTTPError)
        self._logged_states: dict[str, str] = {}

    def create(self, spec: JobSpec, remote: RemoteJob, job: Mapping[str, Any]) -> None:
        """Create a Job, and the network policy and the service that it owns.

        The policy comes first: no pod runs without it.
        """
        name = job_name(remote)
        self.networking.create_namespaced_network_policy(self.namespace, network_policy(spec, remote))
        uid = self.batch.create_namespaced_job(self.namespace, job).metadata.uid
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
        owned = {"metadata": {"ownerReferences": [owner]}}
        self.networking.patch_namespaced_network_policy(name, self.namespace, owned)
        self.core.create_namespaced_service(self.namespace, headless_service(spec, remote, owner))

    def pods(self, selector: str) -> list[Any]:
        """Return the pods that match a label selector."""
        return list(self._call(self.core.list_namespaced_pod, self.namespace, label_selector=selector).items)

    def _call(self, method: Callable[..., Any], *arguments: str, **options: Any) -> Any:
        """Call a method of the API, with retries while the server is unavailable; running jobs continue meanwhile."""
        deadline = time.monotonic() + SILENT_SECONDS
        while True:
            try:
                return method(*arguments, **options)
            except self._api_errors as e:
                status = getattr(e, "status", None) or 500
                if (status != 429 and status < 500) or time.monotonic() > deadline:
                    raise _api_failure(e) from e
                logger.warning("Kubernetes API unreachable (%s); retrying", e)
                time.sleep(POLL_SECONDS)

    def leads(self, remote: RemoteJob) -> bool:
        """Return whether the first pod of a Job has not failed."""
        first = [pod for pod in self.pods(f"{JOB}={remote.id}") if completion_index(pod) == "0"]
        return not any(pod.status.phase == "Failed" for pod in first)

    def goes_on(self, remote: RemoteJob) -> bool:
        """Return whether a pod of a job is pending or running; the client that follows the pod may end before it."""
        return any(pod.status.phase in ("Pending", "Running") for pod in self.pods(f"{JOB}={remote.id}"))

    def failure(self, remote: RemoteJob) -> JobFailed | None:
        """Log state changes of a job's pods, and return the first failure of a pod that failed or cannot start."""
        failure = None
        for pod in sorted(self.pods(f"{JOB}={remote.id}"), key=lambda pod: pod.metadata.name):
            name, state = pod.metadata.name, described(pod)
            if self._logged_states.get(name) != state:
                self._logged_states[name] = state
                logger.info("Kubernetes pod %s: %s", name, state)
            failure = failure or failure_of(pod)
        return failure

    def wait(self, remote: RemoteJob, elastic: bool) -> JobFailed | None:
        """Wait until a Job or its first machine has ended.

        Args:
            remote: The job.
            elastic: Whether the other pods continue when a pod other than the first is lost.

        Returns:
            The failure, or None if the Job did not fail.
        """
        name = job_name(remote)
        while True:
            job = self._call(self.batch.read_namespaced_job, name, self.namespace)
            failure = self.failure(remote)
            for condition in job.status.conditions or []:
                if condition.status == "True" and condition.type == "Complete":
                    return None
                if condition.status == "True" and condition.type == "Failed":
                    if condition.reason == "DeadlineExceeded":
                        return deadline_exceeded(name)
                    return failure or JobFailed(f"Kubernetes job {name} failed: {condition.reason}", retriable=True)
            if failure and failure.specificity and not (elastic and failure.retriable and self.leads(remote)):
                return failure
            if elastic and remote.has_ended():  # else it would wait for pods that were never scheduled
                outcome = remote.outcome()
                if isinstance(outcome, ArtifactRef) or (outcome and not outcome.retriable):
                    return None
            time.sleep(POLL_SECONDS)

    @contextmanager
    def output(self, remote: RemoteJob) -> Iterator[None]:
        """Forward the logs of a Job's pods to stderr, each line prefixed with the completion index of its pod."""
        ended = threading.Event()
        following: dict[str, threading.Thread] = {}

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                with suppress(Exception):
                    for pod in self.pods(f"{JOB}={remote.id}"):
                        name = pod.metadata.name
                        if name not in following and pod.status.phase != "Pending":
                            following[name] = threading.Thread(target=self._pass_on, args=(pod,), daemon=True)
                            following[name].start()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join(POLL_SECONDS)
            for thread in following.values():
                thread.join(POLL_SECONDS)

    def _pass_on(self, pod: Any) -> None:
        with suppress(Exception):
            read: Callable[..., Any] = self.core.read_namespaced_pod_log
            stream = read(pod.metadata.name, self.namespace, follow=True, _preload_content=False)
            for line in stream:
                sys.stderr.write(f"[{completion_index(pod)}] {line.decode(errors='replace')}")

    def end_former(self, artifact: str) -> None:
        """Delete pods left by a killed run, so that they do not compete with this run to publish the artifact."""
        if self.pods(f"{ARTIFACT}={artifact}"):
            logger.warning("Deleting pods of an earlier run for the same artifact (%s=%s)", ARTIFACT, artifact)
            self.delete(f"{ARTIFACT}={artifact}")

    def delete(self, selector: str) -> None:
        """Delete the objects that match a label selector, and wait until no such pod is left.

        Network policies are deleted last. Until then they do not belong to their Job, with which Kubernetes would
        delete them while its pods still save a checkpoint.
        """
        policies = [policy.metadata.name for policy in self._policies(selector)]
        for name in policies:
            disowned = {"metadata": {"ownerReferences": None}}
            self._try(self.networking.patch_namespaced_network_policy, name, body=disowned)
        for job in self._call(self.batch.list_namespaced_job, self.namespace, label_selector=selector).items:
            self._try(self.batch.delete_namespaced_job, job.metadata.name, propagation_policy="Background")
        for service in self._call(self.core.list_namespaced_service, self.namespace, label_selector=selector).items:
            self._try(self.core.delete_namespaced_service, service.metadata.name)
        for pod in self.pods(selector):
            self._try(self.core.delete_namespaced_pod, pod.metadata.name)
        self._wait_for_pods(selector)
        for name in policies:
            self._try(self.networking.delete_namespaced_network_policy, name)

    def _policies(self, selector: str) -> list[Any]:
        """Return the network policies that match a selector; none if the Role, of an earlier version, knows none."""
        list_policies = self.networking.list_namespaced_network_policy
        try:
            return list(self._call(list_policies, self.namespace, label_selector=selector).items)
        except JobFailed as e:
            if getattr(e.__cause__, "status", None) != 403:
                raise
            return []

    def _wait_for_pods(self, selector: str) -> None:
        deadline = time.monotonic() + DELETE_SECONDS
        while self.pods(selector):
            if time.monotonic() > deadline:
                logger.warning("Deleted pods with label %s still running after %d s", selector, DELETE_SECONDS)
                return
            time.sleep(1)

    def _try(self, change: Callable[..., Any], name: str, **options: Any) -> None:
        """Change or delete an object, unless it no longer exists."""
        try:
            self._call(change, name, self.namespace, **options)
        except JobFailed as e:
            if getattr(e.__cause__, "status", None) != 404:
                raise
