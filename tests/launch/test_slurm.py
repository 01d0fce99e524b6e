"""Jobs on a real Slurm of two machines, with the store on a real S3 server that they reach over their network."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import proxy as proxy_server
from servers import slurm as slurm_server
from servers.s3 import Bucket
from servers.slurm import Slurm

from finetune_assets.config.cluster import SlurmJob
from finetune_assets.errors import UserError
from finetune_assets.launch import slurm
from finetune_assets.launch.job import JobFailed, JobSpec
from finetune_assets.launch.remote import RemoteJob
from finetune_assets.launch.slurm import SlurmLauncher
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.objects import Objects

Make = Callable[..., JobSpec]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := slurm_server.missing():
        pytest.skip(f"{missing} is not there (Debian: slurm-wlm munge iproute2)")
    with slurm_server.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(autouse=True)
def _on_the_cluster(cluster: Slurm, ceph: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with proxy_server.running(ceph.endpoint, cluster.controller) as forwarder:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", forwarder.url)
        monkeypatch.setenv("FINETUNE_STORE", ceph.url)
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield
        assert cluster.jobs() == []
        assert [key for key in ceph.listed() if "/jobs/" in key] == []


def left(cluster: Slurm) -> list[str]:
    """Processes of jobs that are still there when Slurm has tidied up after itself."""
    deadline = time.monotonic() + 15
    while True:
        pids = [pid for node in cluster.nodes for pid in cluster.processes_of(node)]
        commands = [command for pid in pids if "slurmd" not in (command := _command(pid))]
        if not commands or time.monotonic() > deadline:
            return commands
        time.sleep(0.2)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return "slurmd, which has ended"


@pytest.mark.parametrize("nodes", [(1, 1), (2, 2), (1, 2)])
def test_job_ends_in_an_artifact(job: Make, tmp_path: Path, cluster: Slurm, nodes: tuple[int, int]) -> None:
    ref = SlurmLauncher().run(job("good", "2", nodes), {})
    store = open_store(os.environ["FINETUNE_STORE"], "me", tmp_path / "elsewhere")
    assert store.find("adapters", "f1") == ref
    assert (store.fetch(ref) / "x.txt").read_text() == "HELLO"
    assert left(cluster) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("user_error", "rank: 0 is wrong"),
        ("one_rank", "rank one is ill"),
        ("import_error", "no_such_module"),
        ("exit", "last words"),
    ],
)
def test_failure_is_told_in_the_workers_own_words(job: Make, cluster: Slurm, body: str, words: str) -> None:
    with pytest.raises(JobFailed, match=words):
        SlurmLauncher().run(job(body, "1", (2, 2)), {})
    assert left(cluster) == []


def test_what_cannot_run_is_refused_in_one_line(job: Make, cluster: Slurm) -> None:
    asked = [
        ({"slurm": SlurmJob(partition="nope")}, "launcher.slurm.partition: there is no 'nope' .* it has main, short"),
        ({"slurm": SlurmJob(partition="short"), "time_limit": "5:00:00"}, "launcher.time_limit"),
        ({"gpus_per_node": 8}, "launcher.gpus_per_node: this cluster has no GPUs"),
        ({"cpus_per_node": 64}, "launcher.cpus_per_node|no node of this cluster has"),
        ({"slurm": SlurmJob(extra_arguments=["--constraint=h100"])}, "Slurm has refused the job: .*[Ff]eature"),
    ]
    for settings, words in asked:
        with pytest.raises(UserError, match=words) as refused:
            SlurmLauncher().run(job("good", **settings), {})
        assert not refused.value.retriable
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"launcher\.nodes"):
        SlurmLauncher().run(job("good", "1", (3, 3)), {})


def test_options_of_a_job_that_dagster_runs_in_are_not_its_jobs(
    job: Make, cluster: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "1", "CPUS_PER_TASK": "64", "MEM_PER_CPU": "1", "NTASKS": "9"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SlurmLauncher().run(job("good"), {})


def test_job_goes_on_while_its_store_is_away(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lingering = slurm._Lingering(RemoteJob.begin(job("good")))
    with monkeypatch.context() as away:
        away.setattr(Objects, "listing", _away)
        assert not lingering.long()
    lingering.remote.end()


def _away(*_: object) -> bool:
    raise UserError("the store does not answer")


@pytest.mark.soak  # sbatch itself tries for two minutes
def test_full_queue_is_told_and_tried_again(
    job: Make, ceph: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slurm_server.running(tmp_path / "full", jobs=2) as full:
        monkeypatch.setenv("SLURM_CONF", full.environment["SLURM_CONF"])
        full.run("sbatch", "--parsable", "--output=/dev/null", "--hold", "--wrap", "true")  # one less than the most
        with pytest.raises(JobFailed, match="Slurm takes no job just now: ") as refused:
            SlurmLauncher().run(job("good"), {})
    assert refused.value.retriable


def test_place_in_the_queue_and_reason_are_told(job: Make, cluster: Slurm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "finetune_assets")
    first = cluster.run("sbatch", "--parsable", "--output=/dev/null", "-N2", "--exclusive", "--wrap", "sleep 12")
    waiting = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--hold", "--wrap", "true")
    SlurmLauncher().run(job("good"), {})
    cluster.run("scancel", first, waiting)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "PENDING (Resources)" in told or "PENDING (Priority)" in told
    assert "of 2 that wait" in told
    assert "RUNNING on n" in told
    assert f"its output is {job('good').cache}/slurm/" in told


def test_interrupt_leaves_no_job_and_no_process(job: Make, tmp_path: Path, cluster: Slurm) -> None:
    process = start(job("sleep", "1", (2, 2)), tmp_path)
    wait_for(lambda: len(list(Path(job("sleep").cache).glob("work/*/output/started"))) == 2)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert cluster.jobs() == []
    assert left(cluster) == []


def test_what_a_killed_run_left_is_cancelled_by_the_next(job: Make, tmp_path: Path, cluster: Slurm) -> None:
    process = start(job("sleep", "1", (2, 2)), tmp_path)
    wait_for(lambda: len(list(Path(job("sleep").cache).glob("work/*/output/started"))) == 2)
    process.kill()
    process.wait()
    (abandoned,) = cluster.jobs()
    SlurmLauncher().run(job("good", "1", (2, 2)), {})
    assert slurm.state_of(abandoned).name == "CANCELLED"
    assert left(cluster) == []
    forget(job("good"))


@pytest.mark.parametrize("how", ["time limit", "preempted"])
def test_what_slurm_ends_is_told_beforehand_and_keeps_what_it_has(job: Make, cluster: Slurm, how: str) -> None:
    """The job itself says in its output that it was told to end."""
    settings = {"time_limit": "0:02:00"} if how == "time limit" else {}
    spec = job("told_to_end", "1", (2, 2), **settings)
    if how == "preempted":
        urgent = (
            "sbatch",
            "--parsable",
            "--output=/dev/null",
            "-p",
            "urgent",
            "-N2",
            "--exclusive",
            "--wrap",
            "sleep 5",
        )

        def preempt() -> None:
            wait_for(lambda: len(list(Path(spec.cache).glob("work/*/output/started"))) == 2)
            cluster.run(*urgent)

        thread = threading.Thread(target=preempt)
        thread.start()
    with pytest.raises(JobFailed) as ended:
        SlurmLauncher().run(spec, {})
    if how == "time limit":
        assert "has reached its time limit 0:02:00: raise launcher.time_limit" in str(ended.value)
        assert not ended.value.retriable
    else:
        assert "has taken the nodes of job" in str(ended.value)
        assert ended.value.retriable
        thread.join()
        wait_for(lambda: cluster.jobs() == [])
    assert len(list(Path(spec.cache).glob("told-*"))) == 2
    assert left(cluster) == []


LAUNCH = """
import sys
from pathlib import Path
from finetune_assets.launch.job import from_json
from finetune_assets.launch.slurm import SlurmLauncher
SlurmLauncher().run(from_json(Path(sys.argv[1]).read_text()), {})
"""


def start(spec: JobSpec, folder: Path) -> "subprocess.Popen[bytes]":
    (folder / "job.json").write_text(spec.to_json())
    return subprocess.Popen([sys.executable, "-c", LAUNCH, str(folder / "job.json")])


def wait_for(so: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def forget(spec: JobSpec) -> None:
    """What a killed launcher left in the store is for garbage collection."""
    objects = Objects(spec.store)
    objects.delete([stored.key for stored in objects.listing(f"{spec.namespace}/jobs")])
