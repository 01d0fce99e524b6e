"""Jobs on a real Slurm of two machines, with the store on a real S3 server that they reach over their network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import proxy as proxy_server
from servers import slurm as slurm_server
from servers.s3 import Bucket
from servers.slurm import Slurm
from tiers import SOAK
from waiting import wait_for

from finetune_assets.config.cluster import SlurmJob
from finetune_assets.errors import UserError
from finetune_assets.launch import slurm
from finetune_assets.launch.slurm import SlurmEngine
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.objects import ObjectStorage
from finetune_assets.worker.job import JobFailed, JobSpec

Make = Callable[..., JobSpec]
Start = Callable[[JobSpec], "subprocess.Popen[bytes]"]
SECONDS = 300
"""How long something may take that happens in a few seconds where nothing else runs."""
pytestmark = pytest.mark.system


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
        jobs = cluster.jobs()
        cluster.clear()  # what a test that failed has left is not the next one's
        assert jobs == []
        assert [key for key in ceph.listed() if "/jobs/" in key] == []


def left(cluster: Slurm) -> list[str]:
    """Processes of jobs that are still there when Slurm has tidied up after itself."""
    deadline = time.monotonic() + 60
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


@pytest.mark.soak
@pytest.mark.parametrize("nodes", [(1, 1), (2, 2), (1, 2)])
def test_job_ends_in_an_artifact(job: Make, tmp_path: Path, cluster: Slurm, nodes: tuple[int, int]) -> None:
    ref = SlurmEngine().run(job("good", "2", nodes), {})
    store = open_store(os.environ["FINETUNE_STORE"], "me", tmp_path / "elsewhere")
    assert store.find("adapters", "f1") == ref
    assert (store.fetch(ref) / "x.txt").read_text() == "HELLO"
    assert left(cluster) == []


@pytest.mark.parametrize(
    ("body", "own_words"),
    [
        pytest.param("user_error", "rank: 0 is wrong", marks=SOAK),
        ("one_rank", "rank one is ill"),
        pytest.param("import_error", "no_such_module", marks=SOAK),
        pytest.param("exit", "last words", marks=SOAK),
    ],
)
def test_failure_is_told_in_the_workers_own_words(job: Make, cluster: Slurm, body: str, own_words: str) -> None:
    with pytest.raises(JobFailed, match=own_words):
        SlurmEngine().run(job(body, "1", (2, 2)), {})
    assert left(cluster) == []


def test_what_cannot_run_is_refused_in_one_line(job: Make, cluster: Slurm) -> None:
    asked = [
        ({"slurm": SlurmJob(partition="nope")}, r"launcher\.slurm\.partition.*'nope'.*main, short"),
        ({"slurm": SlurmJob(partition="short"), "time_limit": "5:00:00"}, r"launcher\.time_limit"),
        ({"gpus_per_node": 8}, r"launcher\.gpus_per_node"),
        ({"cpus_per_node": 64}, r"launcher\.cpus_per_node"),
        ({"slurm": SlurmJob(extra_arguments=["--constraint=h100"])}, "[Ff]eature"),
    ]
    for settings, facts in asked:
        with pytest.raises(UserError, match=facts) as refused:
            SlurmEngine().run(job("good", **settings), {})
        assert not refused.value.retriable
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"launcher\.nodes"):
        SlurmEngine().run(job("good", "1", (3, 3)), {})


@pytest.mark.soak
def test_options_of_a_job_that_dagster_runs_in_are_not_its_jobs(
    job: Make, cluster: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "1", "CPUS_PER_TASK": "64", "MEM_PER_CPU": "1", "NTASKS": "9"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SlurmEngine().run(job("good"), {})


@pytest.mark.soak  # sbatch itself tries for two minutes
def test_full_queue_is_told_and_tried_again(
    job: Make, ceph: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slurm_server.running(tmp_path / "full", jobs=2) as full:
        monkeypatch.setenv("SLURM_CONF", full.environment["SLURM_CONF"])
        full.run("sbatch", "--parsable", "--output=/dev/null", "--hold", "--wrap", "true")  # one less than the most
        with pytest.raises(JobFailed) as refused:
            SlurmEngine().run(job("good"), {})
    assert refused.value.retriable


@pytest.mark.soak
def test_place_in_the_queue_and_reason_are_told(job: Make, cluster: Slurm, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "finetune_assets")
    first = cluster.run("sbatch", "--parsable", "--output=/dev/null", "-N2", "--exclusive", "--wrap", "sleep 600")
    waiting = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--hold", "--wrap", "true")

    def told(*facts: str) -> bool:
        return any(all(fact in record.getMessage() for fact in facts) for record in caplog.records)

    def make_room() -> None:
        wait_for(lambda: told("PENDING", "of 2") and (told("Resources") or told("Priority")))
        cluster.run("scancel", first, waiting)

    with in_background(make_room, cluster):
        SlurmEngine().run(job("good"), {})
    assert told("RUNNING", "n")
    assert told(f"{job('good').cache}/slurm/")


def test_interrupt_leaves_no_job_and_no_process(job: Make, start: Start, cluster: Slurm) -> None:
    process = start(job("sleep", "1", (2, 2)))
    wait_for(lambda: started(job("sleep")) == 2)
    process.send_signal(signal.SIGINT)
    process.wait(SECONDS)
    assert cluster.jobs() == []
    assert left(cluster) == []


@pytest.mark.parametrize("nodes", [(1, 1), pytest.param((2, 2), marks=SOAK)])
def test_what_a_killed_run_left_is_cancelled_by_the_next(
    job: Make, start: Start, cluster: Slurm, nodes: tuple[int, int]
) -> None:
    process = start(job("sleep", "1", nodes))
    wait_for(lambda: started(job("sleep")) == nodes[0])
    process.kill()
    process.wait()
    (abandoned,) = cluster.jobs()
    SlurmEngine().run(job("good", "1", nodes), {})
    state = slurm.state_of(abandoned)
    assert state
    assert state.name == "CANCELLED"
    assert left(cluster) == []
    forget(job("good"))


def test_job_is_told_of_its_time_limit_and_keeps_what_it_has(job: Make, cluster: Slurm) -> None:
    """Its limit is lifted until its workers run, however long they take to start."""
    spec = job("told_to_end", "1", (2, 2), time_limit="0:02:00")

    def reach_the_limit() -> None:
        wait_for(lambda: cluster.jobs() != [])
        (number,) = cluster.jobs()
        cluster.limit(number, 60)
        wait_for(lambda: started(spec) == 2)
        state = slurm.state_of(number)
        assert state
        minutes, seconds = divmod(state.ran, 60)
        # Slurm looks each 30 s, and tells a job 60 s before its end: it has 30 to 90 s from now
        cluster.limit(number, minutes + (1 if seconds < 30 else 2))

    with in_background(reach_the_limit, cluster), pytest.raises(JobFailed, match=r"launcher\.time_limit") as ended:
        SlurmEngine().run(spec, {})
    assert not ended.value.retriable
    assert told_to_end(spec) == 2
    assert left(cluster) == []


@pytest.mark.soak
def test_job_that_is_preempted_is_told_and_keeps_what_it_has(job: Make, cluster: Slurm) -> None:
    spec = job("told_to_end", "1", (2, 2))
    urgent = ["-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1"]

    def preempt() -> None:
        wait_for(lambda: started(spec) == 2)
        cluster.run("sbatch", "--parsable", "--output=/dev/null", *urgent)

    with in_background(preempt, cluster), pytest.raises(JobFailed) as ended:
        SlurmEngine().run(spec, {})
    assert ended.value.retriable
    assert told_to_end(spec) == 2
    wait_for(lambda: cluster.jobs() == [])
    assert left(cluster) == []


def started(spec: JobSpec) -> int:
    """How many of a job's workers compute."""
    return len(list(Path(spec.cache).glob("work/*/output/started")))


def told_to_end(spec: JobSpec) -> int:
    """How many of a job's workers have said in its output that they were told to end."""
    return len(list(Path(spec.cache).glob("told-*")))


@contextmanager
def in_background(act: Callable[[], None], cluster: Slurm) -> Iterator[None]:
    """Do something meanwhile; where it goes wrong the test fails, and nothing waits for the job any longer."""

    def act_or_end() -> None:
        try:
            act()
        except BaseException:
            cluster.clear()
            raise

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(act_or_end)
        try:
            yield
        finally:
            done.result()


LAUNCH = """
import sys
from pathlib import Path
from finetune_assets.worker.job import from_json
from finetune_assets.launch.slurm import SlurmEngine
SlurmEngine().run(from_json(Path(sys.argv[1]).read_text()), {})
"""


@pytest.fixture
def start(_on_the_cluster: None, tmp_path: Path) -> Iterator[Start]:
    """Starts launchers that end with the test."""
    launchers: list[subprocess.Popen[bytes]] = []

    def run(spec: JobSpec) -> "subprocess.Popen[bytes]":
        (tmp_path / "job.json").write_text(spec.to_json())
        launchers.append(subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path / "job.json")]))
        return launchers[-1]

    yield run
    for launcher in launchers:
        launcher.kill()
        launcher.wait()


def forget(spec: JobSpec) -> None:
    """What a killed launcher left in the store is for garbage collection."""
    objects = ObjectStorage(spec.store)
    objects.delete([stored.key for stored in objects.listing(f"{spec.namespace}/jobs")])
