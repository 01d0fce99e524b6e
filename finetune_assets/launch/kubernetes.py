"""Run jobs on Kubernetes: one machine's by dagster-k8s's Pipes client, several machines' as an Indexed Job.

FINETUNE_IMAGE, FINETUNE_KUBERNETES_NAMESPACE, FINETUNE_SERVICE_ACCOUNT: for experiments that name none.

The cluster is the one that this process runs in, or else the current context of KUBECONFIG, as dagster-k8s decides.
`pip install finetune-assets[kubernetes]` brings the clients.
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
from finetune_assets.launch.manifests import ARTIFACT, JOB, headless_service, indexed_job, job_name, labels, pod_spec
from finetune_assets.store.artifacts import ArtifactRef
from finetune_assets.worker.job import JobFailed, JobSpec
from finetune_assets.worker.remote import RemoteJob

POLL_SECONDS = 5.0
SILENT_SECONDS = 600
"""How long the API server may be away."""
DELETE_SECONDS = 150
"""How long pods may take to end: their grace, and a little."""
NOTICE_SECONDS = 30
"""How long after a pod's end the Pipes client may take to see it."""
HOPELESS = ("ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "RunContainerError")
"""What a container waits for in vain. `ErrImagePull` comes before the first, and may pass."""
ADVICE = {
    "ImagePullBackOff": "see launcher.kubernetes.image, and the cluster's right to pull it",
    "InvalidImageName": "see launcher.kubernetes.image",
    "CreateContainerConfigError": "see launcher.kubernetes.secrets",
}
logger = logging.getLogger(__name__)


class KubernetesLauncher:
    """Hands jobs to the API server and follows them. If this process is ended meanwhile, so is the job."""

    def run(self, spec: JobSpec, environment: Mapping[str, str]) -> ArtifactRef:
        """Run a job of several machines and wait for its artifact.

        Args:
            spec: The job.
            environment: Added to that of the pods; Dagster Pipes announces itself here.

        Raises:
            JobFailed: with the worker's own error, or with what Kubernetes did to it.
            UserError: if Kubernetes does not take it.
        """
        with _running(spec) as (cluster, remote):
            job = indexed_job(spec, remote, environment)
            try:
                uid = cluster.batch.create_namespaced_job(cluster.namespace, job).metadata.uid
                owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job_name(remote), "uid": uid}
                cluster.core.create_namespaced_service(cluster.namespace, headless_service(spec, remote, owner))
            except Exception as e:
                raise _refused(e) from e
            with cluster.output(remote):
                failure = cluster.wait(remote, elastic=spec.nodes[0] < spec.nodes[1])
            return _outcome(remote, failure)

    def run_pod(self, spec: JobSpec, follow: Callable[..., Any]) -> ArtifactRef:
        """Run a job of one machine and wait for its artifact.

        Args:
            spec: The job.
            follow: Starts the pod of the given `namespace`, `base_pod_meta` and `base_pod_spec`, passes on what it
                tells, and waits for its end. It is watched from beside: dagster-k8s's client waits without a word, and
                for a day, for a pod that will never start.

        Raises:
            JobFailed: with the worker's own error, or with what Kubernetes did to it.
            UserError: if Kubernetes does not take it.
        """
        with _running(spec) as (cluster, remote):
            wanted = {
                "namespace": cluster.namespace,
                "base_pod_meta": {"labels": labels(spec, remote)},
                "base_pod_spec": pod_spec(spec, remote),
            }
            followed = _Aside(lambda: follow(**wanted))
            failure, since = None, 0.0
            while not followed.ended(POLL_SECONDS) or cluster.goes_on(remote):
                now = cluster.failure(remote)
                failure, since = now, since if failure else time.monotonic()
                if failure and (failure.telling or time.monotonic() - since > NOTICE_SECONDS):
                    break
            failure = failure or cluster.failure(remote)
            return _outcome(remote, failure or (_refused(followed.error) if followed.error else None))


class _Aside:
    """Something that is done in a thread, and nobody's care once it is not waited for any more."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.error: Exception | None = None
        self._asked = False
        self._thread = threading.Thread(target=self._run, args=(do,), daemon=True)
        self._thread.start()

    def _run(self, do: Callable[[], Any]) -> None:
        try:
            do()
        except Exception as e:
            self.error = e

    def ended(self, seconds: float) -> bool:
        """Whether it has, within so long."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        else:
            time.sleep(seconds if self._asked else 0)
        self._asked = True
        return not self._thread.is_alive()


@contextmanager
def _running(spec: JobSpec) -> Iterator[tuple["Cluster", RemoteJob]]:
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
    found = remote.outcome()
    if isinstance(found, ArtifactRef):
        return found
    if failure and (failure.telling or (found and found.telling < 0)):
        raise failure
    raise found or failure or JobFailed(f"job {remote.id} ended and made nothing; see its output", retriable=True)


def _refused(error: BaseException) -> JobFailed:
    """What the API server, or the client, says."""
    status, reason = getattr(error, "status", None), getattr(error, "reason", None)
    if status is None:
        return JobFailed(f"Kubernetes: {error}", retriable=True)
    body = " ".join(str(getattr(error, "body", "") or "").split())
    return JobFailed(f"Kubernetes has refused the job ({status} {reason}): {body[:500]}", retriable=status >= 500)


class Cluster:
    """The API server, as far as it concerns jobs.

    Args:
        namespace: Of the pods.

    Raises:
        UserError: if there is no client, or it knows no cluster.
    """

    def __init__(self, namespace: str) -> None:
        try:
            import kubernetes  # type: ignore[import-untyped]
            import urllib3
        except ImportError as e:
            raise UserError("launcher.engine: 'kubernetes' needs: pip install 'finetune-assets[kubernetes]'") from e
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST"):
                kubernetes.config.load_incluster_config()
            else:
                kubernetes.config.load_kube_config()
        except kubernetes.config.ConfigException as e:
            raise UserError(f"launcher.engine: 'kubernetes' finds no cluster ({e}); set KUBECONFIG") from e
        self.namespace = namespace
        self.core, self.batch = kubernetes.client.CoreV1Api(), kubernetes.client.BatchV1Api()
        self._refusals = (kubernetes.client.ApiException, urllib3.exceptions.HTTPError)
        self._told: dict[str, str] = {}

    def pods(self, selector: str) -> list[Any]:
        return list(self._asked(self.core.list_namespaced_pod, self.namespace, label_selector=selector).items)

    def _asked(self, ask: Callable[..., Any], *what: str, **more: Any) -> Any:
        """What the API server says; it may be away for a while, and jobs go on meanwhile."""
        deadline = time.monotonic() + SILENT_SECONDS
        while True:
            try:
                return ask(*what, **more)
            except self._refusals as e:
                status = getattr(e, "status", None) or 500
                if (status != 429 and status < 500) or time.monotonic() > deadline:
                    raise _refused(e) from e
                logger.warning("Kubernetes API unreachable (%s); retrying", e)
                time.sleep(POLL_SECONDS)

    def leads(self, remote: RemoteJob) -> bool:
        """Whether the first pod of a Job has not failed."""
        first = [pod for pod in self.pods(f"{JOB}={remote.id}") if _number(pod) == "0"]
        return not any(pod.status.phase == "Failed" for pod in first)

    def goes_on(self, remote: RemoteJob) -> bool:
        """Whether a pod of a job waits or runs: what followed it may have ended before it."""
        return any(pod.status.phase in ("Pending", "Running") for pod in self.pods(f"{JOB}={remote.id}"))

    def failure(self, remote: RemoteJob) -> JobFailed | None:
        """Tell how the pods of a job are, where that has changed; the first that has failed or never will start."""
        found = None
        for pod in sorted(self.pods(f"{JOB}={remote.id}"), key=lambda pod: pod.metadata.name):
            name, state = pod.metadata.name, described(pod)
            if self._told.get(name) != state:
                self._told[name] = state
                logger.info("Kubernetes' pod %s: %s", name, state)
            found = found or failure_of(pod)
        return found

    def wait(self, remote: RemoteJob, elastic: bool) -> JobFailed | None:
        """Until a Job has ended, or its first machine; why, if it failed.

        Args:
            remote: The job.
            elastic: Whether the rest goes on where a pod is lost that is not the first.
        """
        name = job_name(remote)
        while True:
            job = self._asked(self.batch.read_namespaced_job, name, self.namespace)
            failure = self.failure(remote)
            for condition in job.status.conditions or []:
                if condition.status == "True" and condition.type == "Complete":
                    return None
                if condition.status == "True" and condition.type == "Failed":
                    if condition.reason == "DeadlineExceeded":
                        return _deadline(name)
                    return failure or JobFailed(f"Kubernetes' job {name}: {condition.reason}", retriable=True)
            if failure and failure.telling and not (elastic and failure.retriable and self.leads(remote)):
                return failure
            if elastic and remote.has_ended():  # pods that never found room would be waited for
                found = remote.outcome()
                if isinstance(found, ArtifactRef) or (found and not found.retriable):
                    return None
            time.sleep(POLL_SECONDS)

    @contextmanager
    def output(self, remote: RemoteJob) -> Iterator[None]:
        """Pass on what the pods of a Job print, each line with the number of its pod."""
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
                sys.stderr.write(f"[{_number(pod)}] {line.decode(errors='replace')}")

    def end_former(self, artifact: str) -> None:
        """End what a run that was killed has left: it could never publish beside this one."""
        if self.pods(f"{ARTIFACT}={artifact}"):
            logger.warning("pods of an earlier run make the same (%s=%s); they are deleted", ARTIFACT, artifact)
            self.delete(f"{ARTIFACT}={artifact}")

    def delete(self, selector: str) -> None:
        """Delete what bears some labels, and wait until no pod of it is left."""
        for job in self._asked(self.batch.list_namespaced_job, self.namespace, label_selector=selector).items:
            self._gone(self.batch.delete_namespaced_job, job.metadata.name, propagation_policy="Background")
        for service in self._asked(self.core.list_namespaced_service, self.namespace, label_selector=selector).items:
            self._gone(self.core.delete_namespaced_service, service.metadata.name)
        for pod in self.pods(selector):
            self._gone(self.core.delete_namespaced_pod, pod.metadata.name)
        deadline = time.monotonic() + DELETE_SECONDS
        while self.pods(selector):
            if time.monotonic() > deadline:
                logger.warning("pods with %s were deleted and have not ended in %d s", selector, DELETE_SECONDS)
                return
            time.sleep(1)

    def _gone(self, delete: Callable[..., Any], name: str, **options: str) -> None:
        try:
            self._asked(delete, name, self.namespace, **options)
        except JobFailed as e:
            if getattr(e.__cause__, "status", None) != 404:
                raise


def _number(pod: Any) -> str:
    """Of a Job's pod."""
    return str((pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index", "?"))


def described(pod: Any) -> str:
    """A pod's state and why it waits, in words."""
    status = pod.status
    waiting = [one.state.waiting for one in status.container_statuses or [] if one.state and one.state.waiting]
    if waiting and waiting[0].reason:
        return f"{waiting[0].reason} {waiting[0].message or ''}".strip()
    scheduled = [one for one in status.conditions or [] if one.type == "PodScheduled" and one.status == "False"]
    if status.phase == "Pending" and scheduled:
        return f"Pending ({scheduled[0].reason}): {scheduled[0].message or ''}"
    return f"{status.phase} on {pod.spec.node_name}" if pod.spec.node_name else str(status.phase)


def failure_of(pod: Any) -> JobFailed | None:
    """What has gone wrong with a pod, if something has; `telling` where it is Kubernetes that says so."""
    name, status = pod.metadata.name, pod.status
    for container in status.container_statuses or []:
        state = container.state
        if state and state.waiting and state.waiting.reason in HOPELESS:
            reason = state.waiting.reason
            advice = ADVICE.get(reason, "see its events")
            return JobFailed(f"pod {name} cannot start ({reason}: {state.waiting.message}); {advice}", telling=1)
        if state and state.terminated and state.terminated.reason == "OOMKilled":
            return JobFailed(f"pod {name} needed more memory than it was given: raise launcher.memory", telling=1)
    if status.phase != "Failed":
        return None
    if status.reason == "DeadlineExceeded":
        return _deadline(f"pod {name}")
    if status.reason:
        return JobFailed(f"pod {name} was ended ({status.reason}): {status.message}", retriable=True, telling=1)
    codes = [one.state.terminated.exit_code for one in status.container_statuses or [] if one.state.terminated]
    return JobFailed(f"pod {name} ended with code {codes[0] if codes else 'unknown'}; see its output", retriable=True)


def _deadline(what: str) -> JobFailed:
    return JobFailed(
        f"{what} has reached its time limit: raise launcher.time_limit; the next run goes on from its last checkpoint",
        telling=1,
    )
