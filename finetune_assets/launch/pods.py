"""States of a job's pods, and the failures that they show."""

from typing import Any

from finetune_assets.worker.job import JobFailed

HOPELESS = ("ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "RunContainerError")
"""Waiting reasons from which a container does not recover. `ErrImagePull` precedes the first and may be transient."""
ADVICE = {
    "ImagePullBackOff": "check launcher.kubernetes.image and the cluster's permission to pull it",
    "InvalidImageName": "check launcher.kubernetes.image",
    "CreateContainerConfigError": "check launcher.kubernetes.secrets",
}


def completion_index(pod: Any) -> str:
    """Return the completion index of a Job's pod."""
    return str((pod.metadata.annotations or {}).get("batch.kubernetes.io/job-completion-index", "?"))


def described(pod: Any) -> str:
    """Describe the state of a pod, and the reason if it is waiting."""
    status = pod.status
    states = [container.state for container in status.container_statuses or []]
    waiting = [state.waiting for state in states if state and state.waiting]
    if waiting and waiting[0].reason:
        return f"{waiting[0].reason} {waiting[0].message or ''}".strip()
    conditions = [condition for condition in status.conditions or [] if condition.type == "PodScheduled"]
    unscheduled = [condition for condition in conditions if condition.status == "False"]
    if status.phase == "Pending" and unscheduled:
        return f"Pending ({unscheduled[0].reason}): {unscheduled[0].message or ''}"
    return f"{status.phase} on {pod.spec.node_name}" if pod.spec.node_name else str(status.phase)


def failure_of(pod: Any) -> JobFailed | None:
    """Return the failure of a pod, or None; `specificity` is 1 if Kubernetes reports the cause."""
    name, status = pod.metadata.name, pod.status
    for container in status.container_statuses or []:
        state = container.state
        if state and state.waiting and state.waiting.reason in HOPELESS:
            reason = state.waiting.reason
            advice = ADVICE.get(reason, "check the events of the pod")
            return JobFailed(f"pod {name} cannot start ({reason}: {state.waiting.message}); {advice}", specificity=1)
        if state and state.terminated and state.terminated.reason == "OOMKilled":
            return JobFailed(f"pod {name} ran out of memory (OOMKilled): raise launcher.memory", specificity=1)
    if status.phase != "Failed":
        return None
    if status.reason == "DeadlineExceeded":
        return deadline_exceeded(f"pod {name}")
    if status.reason:
        return JobFailed(
            f"pod {name} was terminated ({status.reason}): {status.message}", retriable=True, specificity=1
        )
    states = [container.state for container in status.container_statuses or []]
    codes = [state.terminated.exit_code for state in states if state.terminated]
    code = codes[0] if codes else "unknown"
    return JobFailed(f"pod {name} failed with exit code {code}; check its output", retriable=True)


def deadline_exceeded(name: str) -> JobFailed:
    return JobFailed(
        f"{name} reached its time limit: raise launcher.time_limit; the next run resumes from its last checkpoint",
        specificity=1,
    )
