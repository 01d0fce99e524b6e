"""The graph with training on a real Slurm of two machines, which reach a real S3 server over their network."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import dagster as dg
import pytest
from integration.cli import materialize, materialize_command
from integration.graph import Graph
from launch.test_slurm import SECONDS, cluster, in_background, left
from projects import TestProject
from safetensors.torch import load
from servers import proxy as proxy_server
from servers.s3 import Bucket
from servers.slurm import Slurm
from waiting import wait_for

from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.artifacts.layout import TRAINER_STATE
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.gc import inventory

__all__ = ["cluster"]
LONG = [
    "training.max_steps=20",
    "training.save_steps=4",
    "training.logging_steps=4",
    "training.macro_batch_size=4",
    "training.micro_batch_size=2",
    "lora.dropout=0.1",
]
pytestmark = pytest.mark.system
TWO_NODES = ["launcher.engine=slurm", "launcher.nodes=2", "training.processes_per_node=1"]


@pytest.fixture(autouse=True)
def _on_the_cluster(
    cluster: Slurm, project: TestProject, ceph: Bucket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    with proxy_server.running(ceph.endpoint, cluster.controller) as forwarder:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", forwarder.url)
        monkeypatch.setenv("FINETUNE_STORE", ceph.url)
        monkeypatch.setenv("FINETUNE_NODE_CACHE", f"{project.root}/$SLURMD_NODENAME")
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield
        jobs = cluster.jobs()
        cluster.clear()  # what a test that failed has left is not the next one's
        assert jobs == []
        assert left(cluster) == []
        assert [key for key in ceph.listed() if "/jobs/" in key] == []
        assert_secrets_are_nowhere(project, ceph)


def assert_secrets_are_nowhere(project: TestProject, ceph: Bucket) -> None:
    """Those of S3, which a job has from the environment."""
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    files = [path for path in project.root.rglob("*") if path.is_file()]
    assert [path.name for path in files if path.suffix == ".log"], "what the job printed is looked at too"
    assert [path for path in files if secret in path.read_bytes()] == []
    assert [key for key in ceph.listed() if secret in ceph.get(key)] == []


@pytest.fixture
def prepared(graph: Graph) -> None:
    """What a training needs is in the store."""
    made = graph.run(["*tokenized_dataset", "*training_plan"], overrides=LONG)
    assert made.success, made.log


def read(project: TestProject, ceph: Bucket, name: str) -> bytes:
    """A file of the only adapter."""
    store = open_store(ceph.url, "tests", project.root / "elsewhere")
    (found,) = [one for one in inventory(store.objects).artifacts if one.kind == ADAPTERS.folder]
    return store.read(ADAPTERS.folder, found.name, found.manifest, name)


def adapter(project: TestProject, ceph: Bucket) -> bytes:
    """Its weights."""
    return read(project, ceph, "adapter_model.safetensors")


def processes(project: TestProject, ceph: Bucket) -> int:
    """How many trained it together, at last."""
    return int(json.loads(read(project, ceph, TRAINER_STATE))["active"]["processes"])


def retries() -> int:
    """How often Dagster has tried a step of its newest run again."""
    with dg.DagsterInstance.get() as instance:
        run = instance.get_runs(limit=1)[0]
        events = [entry.dagster_event_type for entry in instance.all_logs(run.run_id)]
    return events.count(dg.DagsterEventType.STEP_UP_FOR_RETRY)


def resumed_at(output: str) -> list[int]:
    """Steps at which a training went on from a checkpoint."""
    return [int(step) for step in re.findall(r"checkpoint.*\bstep (\d+)", output)]


def checkpoints(ceph: Bucket) -> list[str]:
    """Whole ones in the store."""
    return [key for key in ceph.listed() if "/checkpoints/" in key and key.endswith("manifest.json")]


@pytest.mark.minutes
def test_two_nodes_give_the_adapter_of_two_processes_and_outlive_a_node(
    project: TestProject, graph: Graph, ceph: Bucket, cluster: Slurm, prepared: None
) -> None:
    """On one node with two processes, and on two nodes of which one dies; the same to the bit."""
    one = graph.run("lora_adapter", overrides=[*LONG, "training.processes_per_node=2"])
    assert one.success, one.log
    expected = adapter(project, ceph)

    if os.environ.get("SOAK"):
        two = materialize("lora_adapter", overrides=[*LONG, *TWO_NODES], force=True)
        assert two.returncode == 0, two.stdout[-5000:]
        assert processes(project, ceph) == 2
        assert not resumed_at(two.stdout)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] not in two.stdout
        assert adapter(project, ceph) == expected

    victim = cluster.nodes[1]

    def power_fails() -> None:
        wait_for(lambda: checkpoints(ceph))
        cluster.kill(victim)
        wait_for(lambda: cluster.has_lost(victim))
        cluster.boot(victim, again=True)  # as a machine does by itself

    with in_background(power_fails, cluster):
        hurt = materialize("lora_adapter", overrides=[*LONG, *TWO_NODES], force=True)
    assert hurt.returncode == 0, hurt.stdout[-5000:]
    assert "n[1-2]" in hurt.stdout, "where Slurm runs it"
    assert "20/20" in hurt.stdout, "how far it is"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in one.log + hurt.stdout
    assert processes(project, ceph) == 2
    assert retries() == 1
    assert any(resumed_at(hurt.stdout))
    assert adapter(project, ceph) == expected
    assert not [key for key in ceph.listed() if "/checkpoints/" in key]


@pytest.mark.soak
@pytest.mark.parametrize("lost", [1, 0], ids=["another", "the first"])
def test_where_fewer_are_enough_the_rest_goes_on(
    project: TestProject, ceph: Bucket, cluster: Slurm, prepared: None, lost: int
) -> None:
    victim = cluster.nodes[lost]

    def power_fails() -> None:
        wait_for(lambda: checkpoints(ceph))
        cluster.kill(victim)

    overrides = [*LONG, *TWO_NODES, "launcher.nodes=1-2", "launcher.rendezvous_seconds=60"]
    try:
        with in_background(power_fails, cluster):
            run = materialize("lora_adapter", overrides=overrides)
    finally:
        cluster.boot(victim, again=True)
        wait_for(cluster.ready)
    assert run.returncode == 0, run.stdout[-5000:]
    assert "n[1-2]" in run.stdout, "where Slurm began it"
    assert processes(project, ceph) == 1
    assert any(resumed_at(run.stdout))
    assert retries() == (1 if lost == 0 else 0)
    assert load(adapter(project, ceph))


@pytest.mark.soak
def test_terminated_run_leaves_no_job_and_keeps_a_checkpoint(
    project: TestProject, ceph: Bucket, cluster: Slurm, prepared: None
) -> None:
    command = materialize_command("lora_adapter", overrides=[*LONG, *TWO_NODES, "training.max_steps=5000"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        wait_for(lambda: checkpoints(ceph))
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=SECONDS)
    assert cluster.jobs() == []
    assert checkpoints(ceph)
