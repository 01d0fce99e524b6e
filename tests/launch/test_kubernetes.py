"""The whole life of a job on Kubernetes, by the real clients, against an API server of ours on loopback.

No real cluster has run these; what that leaves open is in docs/kubernetes.md.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import dagster as dg
import kubernetes_validate
import pytest
from paths import ROOT
from servers import kubernetes as kubernetes_server
from servers.kubernetes import Server
from servers.s3 import Bucket
from tiers import SOAK, tiered
from waiting import wait_for

from finetune_assets.config.cluster import KubernetesJob, LauncherSettings
from finetune_assets.config.loading import load_experiment
from finetune_assets.launch import kubernetes
from finetune_assets.launch.engines import Launcher
from finetune_assets.launch.manifests import headless_service, indexed_job, job_name, merged, network_policy, pod_spec
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.objects import ObjectStorage
from finetune_assets.worker.job import JobSpec
from finetune_assets.worker.remote import RemoteJob

Make = Callable[..., JobSpec]
SECONDS = 300
"""How long something may take that happens in a few seconds where nothing else runs."""
RECORDED = Path(__file__).with_name("kubernetes_requests.json")
SYSTEM = pytest.mark.system
"""Of what runs jobs; what is asked of the API server is for every change."""


@pytest.fixture
def in_s3(ceph: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store; without this, it is a folder that all share, which takes less time."""
    monkeypatch.setenv("FINETUNE_STORE", ceph.url)


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("FINETUNE_SHARED", "1")


@pytest.fixture(autouse=True)
def api(_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(kubernetes, "POLL_SECONDS", 0.5)
    with kubernetes_server.running(tmp_path / "kubernetes") as running:
        monkeypatch.setenv("KUBECONFIG", str(running.config()))  # for other processes; this one has read it already
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(running.config()))
        monkeypatch.setenv("FINETUNE_IMAGE", "registry/finetune:1")
        monkeypatch.setenv("FINETUNE_LAUNCHER", "kubernetes")
        yield running
        assert running.pods() == []
        assert running.objects == {}
        assert [stored.key for stored in ObjectStorage(os.environ["FINETUNE_STORE"]).listing("me/jobs")] == []


def run(spec: JobSpec) -> dg.ExecuteInProcessResult:
    @dg.asset
    def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        run_in_pipes(context, Launcher(), spec)
        return dg.MaterializeResult()

    return dg.materialize([made], raise_on_error=False)


def error(result: dg.ExecuteInProcessResult) -> str:
    (failed,) = result.get_step_failure_events()
    told = failed.step_failure_data.error
    assert told
    return str(told.cause.message if told.cause else told.message)


KINDS = [(1, 1), (2, 2)]
NAMES = ["a pod", "a job"]
NODES = pytest.mark.parametrize("nodes", KINDS, ids=NAMES)
ALONE = pytest.param(KINDS[0], id=NAMES[0], marks=pytest.mark.soak)
JOB = pytest.mark.parametrize("nodes", [ALONE, pytest.param(KINDS[1], id=NAMES[1])])
"""Of what ends otherwise: a pod alone differs from a job of several in how it is created."""
POD = pytest.mark.parametrize("nodes", tiered(KINDS, system=KINDS[:1]), ids=NAMES)
"""Of what is the same for both."""


@SYSTEM
@JOB
def test_job_ends_in_an_artifact(in_s3: None, job: Make, tmp_path: Path, api: Server, nodes: tuple[int, int]) -> None:
    assert run(job("good", "1", nodes)).success
    store = open_store(os.environ["FINETUNE_STORE"], "me", tmp_path / "elsewhere")
    ref = store.find("adapters", "f1")
    assert ref
    assert (store.fetch(ref) / "x.txt").read_text() == "HELLO"
    assert [tree["kind"] for tree in api.created] == (
        ["Pod"] if nodes == (1, 1) else ["NetworkPolicy", "Job", "Service"]
    )


@POD
@pytest.mark.parametrize(
    ("body", "own_words"), [("user_error", "rank: 0 is wrong"), pytest.param("exit", "\nlast words", marks=SOAK)]
)
def test_failure_is_told_in_the_workers_own_words(job: Make, nodes: tuple[int, int], body: str, own_words: str) -> None:
    assert own_words in error(run(job(body, "1", nodes)))


@NODES
def test_image_that_is_not_there_is_named(job: Make, nodes: tuple[int, int]) -> None:
    spec = job("good", "1", nodes, kubernetes=KubernetesJob(image="registry/absent:2"))
    message = error(run(spec))
    assert all(fact in message for fact in ("ImagePullBackOff", "registry/absent:2", "launcher.kubernetes.image"))


@pytest.mark.soak
@SYSTEM
@JOB
def test_evicted_pod_is_told_and_may_be_tried_again(job: Make, api: Server, nodes: tuple[int, int]) -> None:
    spec = job("sleep", "1", nodes)
    thread = threading.Thread(target=lambda: api.evict(wait_for(lambda: started(api))[0]))
    thread.start()
    failed = run(spec)
    thread.join()
    assert_evicted(failed)


def assert_evicted(failed: dg.ExecuteInProcessResult) -> None:
    """What Kubernetes says of it, word for word."""
    message = error(failed)
    assert all(fact in message for fact in ("Evicted", "The node was low on resource: ephemeral-storage."))


@pytest.mark.soak
@SYSTEM
@JOB
def test_server_that_is_away_for_a_while_ends_nothing(job: Make, api: Server, nodes: tuple[int, int]) -> None:
    def upgrade() -> None:
        wait_for(lambda: len(started(api)) == nodes[0])
        api.away = time.monotonic() + 4

    thread = threading.Thread(target=upgrade)
    thread.start()
    assert run(job("slow", "1", nodes)).success
    thread.join()


@pytest.mark.soak
@SYSTEM
@pytest.mark.parametrize("lost", [1, 0], ids=["another", "the first"])
def test_where_fewer_are_enough_the_rest_goes_on(job: Make, tmp_path: Path, api: Server, lost: int) -> None:
    def evict() -> None:
        wait_for(lambda: len(started(api)) == 2)
        api.evict(next(name for name in started(api) if f"-{lost}-" in name))

    thread = threading.Thread(target=evict)
    thread.start()
    ended = run(job("of_two", "1", (1, 2)))
    thread.join()
    if lost == 0:
        assert_evicted(ended)
        return
    assert ended.success
    store = open_store(os.environ["FINETUNE_STORE"], "me", tmp_path / "elsewhere")
    ref = store.find("adapters", "f1")
    assert ref
    assert (store.fetch(ref) / "x.txt").read_text() == "1"


def test_time_limit_is_told(job: Make) -> None:
    """A pod's; a Job's deadline is the real controller's."""
    assert "launcher.time_limit" in error(run(job("sleep", "1", time_limit="0:00:02")))


@pytest.mark.soak
@SYSTEM
def test_pod_that_waits_for_a_gpu_says_so(job: Make, api: Server) -> None:
    process = start(job("good", "1", gpus_per_node=1), api)
    try:
        assert process.stdout
        for line in process.stdout:
            if b"Unschedulable" in line:
                break
        assert b"0/1 nodes are available: 1 Insufficient nvidia.com/gpu." in line
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)


@pytest.mark.soak
@SYSTEM
@JOB
def test_interrupt_leaves_nothing(job: Make, api: Server, nodes: tuple[int, int]) -> None:
    process = start(job("sleep", "1", nodes), api)
    wait_for(lambda: len(started(api)) == nodes[0])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    assert api.pods() == []


@POD
def test_what_a_killed_run_left_is_deleted_by_the_next(job: Make, api: Server, nodes: tuple[int, int]) -> None:
    process = start(job("sleep", "1", nodes), api)
    wait_for(lambda: len(started(api)) == nodes[0])
    process.kill()
    process.wait()
    assert len(api.pods()) == nodes[0]
    assert run(job("good", "1", nodes)).success
    forget(job("good"))


@NODES
def test_what_the_server_refuses_is_told(job: Make, api: Server, nodes: tuple[int, int]) -> None:
    api.refuses = "pods is forbidden: User cannot create resource"
    message = error(run(job("good", "1", nodes)))
    assert "403" in message
    assert api.refuses in message


FULL = LauncherSettings(
    gpus_per_node=8,
    cpus_per_node=64,
    memory="512G",
    time_limit="1-00:00:00",
    environment={"NCCL_SOCKET_IFNAME": "eth0"},
    kubernetes=KubernetesJob(
        image="registry/finetune@sha256:abc",
        node_selector={"gpu": "h100"},
        tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        service_account="finetune",
        secrets=["s3"],
        queue="research",
        pod={"priorityClassName": "low", "containers": [{"name": "worker", "imagePullPolicy": "Always"}]},
    ),
)


def asked(settings: LauncherSettings) -> dict[str, object]:
    return {name: value for name, value in vars(settings).items() if name != "nodes"}


@pytest.mark.parametrize("settings", [LauncherSettings(), FULL], ids=["least", "most"])
@pytest.mark.parametrize("nodes", [(1, 1), (4, 4), (1, 4)])
def test_manifests_are_what_kubernetes_knows(job: Make, settings: LauncherSettings, nodes: tuple[int, int]) -> None:
    spec = job("good", "auto", nodes, **asked(settings))
    remote = RemoteJob(spec.store, spec.namespace, "abc-123")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod_spec(spec, remote)}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "x", "uid": "u"}
    policy = network_policy(spec, remote)
    for tree in (pod, indexed_job(spec, remote, {"A": "b"}), headless_service(spec, remote, owner), policy):
        kubernetes_validate.validate(tree, kubernetes_server.VERSION, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**pod, "spec": {**pod["spec"], "gpu": 1}}, kubernetes_server.VERSION, strict=True)


def test_what_is_set_is_asked_for(job: Make) -> None:
    spec = job("good", "auto", (4, 4), **asked(FULL))
    tree = indexed_job(spec, RemoteJob(spec.store, spec.namespace, "abc-123"), {"A": "b"})
    pod = tree["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert tree["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert tree["spec"]["activeDeadlineSeconds"] == 24 * 3600
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "512Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert container["imagePullPolicy"] == "Always"
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["NCCL_SOCKET_IFNAME"] == "eth0"
    assert variables["FINETUNE_HEAD"] == "finetune-abc-123-0.finetune-abc-123:29400"
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["serviceAccountName"] == "finetune"
    assert pod["priorityClassName"] == "low"


@pytest.mark.parametrize("nodes", [(1, 1), (2, 2), (1, 4)])
def test_pod_has_no_token_of_the_api_server_unless_its_settings_mount_it(job: Make, nodes: tuple[int, int]) -> None:
    def mounts(**settings: object) -> object:
        spec = job("good", "1", nodes, **settings)
        remote = RemoteJob(spec.store, spec.namespace, "abc")
        made = pod_spec(spec, remote) if nodes == (1, 1) else indexed_job(spec, remote, {})["spec"]["template"]["spec"]
        return made["automountServiceAccountToken"]

    assert mounts() is False
    assert mounts(kubernetes=KubernetesJob(service_account="finetune", pod={"priorityClassName": "low"})) is False
    assert mounts(kubernetes=KubernetesJob(pod={"automountServiceAccountToken": True})) is True


def test_pod_gets_the_hash_of_its_job(job: Make) -> None:
    spec = job("good", "1")
    remote = RemoteJob.begin(spec)
    (container,) = pod_spec(spec, remote)["containers"]
    assert container["command"][-4:] == [spec.store, "me", remote.id, remote.digest]
    assert len(remote.digest) == 64
    remote.end()


def test_only_the_pods_of_a_job_reach_each_other(job: Make) -> None:
    spec = job("good", "1", (2, 2))
    remote, another = (RemoteJob(spec.store, spec.namespace, name) for name in ("abc-1", "abc-2"))
    policy = network_policy(spec, remote)
    its_labels = indexed_job(spec, remote, {})["spec"]["template"]["metadata"]["labels"]
    other_labels = indexed_job(spec, another, {})["spec"]["template"]["metadata"]["labels"]
    (rule,) = policy["spec"]["ingress"]
    (source,) = rule["from"]
    assert rule.keys() == {"from"}, "on any port: the ranks' are chosen as they start"
    for selector in (policy["spec"]["podSelector"], source["podSelector"]):
        (label,) = selector["matchLabels"].items()
        assert label in its_labels.items()
        assert label not in other_labels.items()
    assert source.keys() == {"podSelector"}, "of this namespace only"
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["metadata"]["name"] == job_name(remote)


@SYSTEM
def test_policy_is_there_before_the_pods_and_until_they_have_ended(job: Make, api: Server) -> None:
    spec = job("sleep", "1", (2, 2))
    process = start(spec, api)
    wait_for(lambda: len(started(api)) == 2)
    (policy,) = [tree for (kind, _), tree in api.objects.items() if kind == "networkpolicies"]
    assert [owner["kind"] for owner in policy["metadata"]["ownerReferences"]] == ["Job"]
    assert [tree["kind"] for tree in api.created][:2] == ["NetworkPolicy", "Job"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    last = [request for request in api.requests if request.startswith(("DELETE", "GET pods"))]
    assert last[-1] == "DELETE networkpolicies/NAME", "after the last look at the pods"


@pytest.mark.system
def test_role_that_knows_no_policies_refuses_a_job_of_several_machines_only(job: Make, api: Server) -> None:
    """A Role of an earlier version."""
    api.refused_kinds = {"networkpolicies"}
    assert "403" in error(run(job("good", "1", (2, 2))))
    assert [tree["kind"] for tree in api.created] == []
    assert run(job("good", "1")).success


def test_no_secret_is_in_a_manifest(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = job("good", "1", (2, 2))
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "planted-secret")
    assert "planted-secret" not in json.dumps(indexed_job(spec, RemoteJob(spec.store, "me", "abc"), {}))


def test_of_lists_things_of_the_same_name_are_merged() -> None:
    base = {"a": [{"name": "x", "one": 1}], "b": 1}
    over = {"a": [{"name": "x", "two": 2}, {"name": "y"}], "c": 3}
    assert merged(base, over) == {"a": [{"name": "x", "one": 1, "two": 2}, {"name": "y"}], "b": 1, "c": 3}


@pytest.mark.soak
@SYSTEM
def test_the_clients_ask_what_they_asked_when_this_was_recorded(job: Make, api: Server) -> None:
    """The server above answers these requests; a new client that asks others needs another look at it."""
    for nodes in ((1, 1), (2, 2)):
        assert run(job("good", "1", nodes)).success
        store = open_store(os.environ["FINETUNE_STORE"], "me", api.folder / "elsewhere")
        store.objects.delete([stored.key for stored in store.objects.listing("me/adapters")])
    asked = {"dagster-k8s": version("dagster-k8s"), "requests": sorted(set(api.requests))}
    if os.environ.get("RECORD"):
        RECORDED.write_text(json.dumps(asked, indent=2) + "\n")
    assert asked == json.loads(RECORDED.read_text())


def test_settings_reach_the_job(project: object, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["launcher.engine=kubernetes", "launcher.nodes=2-4", "launcher.kubernetes.node_selector.gpu=h100"]
    config = load_experiment(ROOT / "configs", "demo", overrides).config
    assert config.launcher.node_range == (2, 4)
    assert config.launcher.kubernetes.node_selector == {"gpu": "h100"}


LAUNCH = """
import logging, sys
from pathlib import Path
import dagster as dg
from finetune_assets.launch import kubernetes
from finetune_assets.launch.engines import Launcher
from finetune_assets.worker.job import from_json
from finetune_assets.launch.pipes import run_in_pipes
from finetune_assets.config.cluster import LauncherSettings
from dataclasses import replace
logging.basicConfig(level=logging.INFO)
kubernetes.POLL_SECONDS = 0.5
spec = from_json(Path(sys.argv[1]).read_text())
spec = replace(spec, settings=LauncherSettings(gpus_per_node=int(sys.argv[2]) or None))
@dg.asset
def made(context):
    run_in_pipes(context, Launcher(), spec)
    return dg.MaterializeResult()
dg.materialize([made])
"""


def start(spec: JobSpec, api: Server) -> "subprocess.Popen[bytes]":
    path = api.folder / "job.json"
    path.write_text(spec.to_json())
    command = [sys.executable, "-c", LAUNCH, str(path), str(spec.settings.gpus_per_node or 0)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def started(api: Server) -> list[str]:
    """Names of the pods whose worker computes."""
    found = api.folder.glob("volumes/*/work/*/output/started")
    return [path.parents[3].name for path in found]


def forget(spec: JobSpec) -> None:
    """What a killed launcher left in the store is for garbage collection."""
    store = open_store(spec.store, spec.namespace, Path(spec.cache))
    store.objects.delete([stored.key for stored in store.objects.listing(f"{spec.namespace}/jobs")])
