"""What tests share: a project of their own, the real data beside the project, and the rule on skipping."""

import gc
import logging
import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, constants
from paths import SHARED
from projects import TestProject, share_derived
from reading.first_run import followed
from servers import ceph as ceph_server
from servers import hub as hub_server
from servers import proxy as proxy_server
from servers.hub import Hub
from servers.proxy import Proxy
from servers.s3 import Bucket

gc.disable()  # until all tests are collected
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests start trainings beside their own
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of the test processes has one core


# A shell starts what is in its background with SIGINT ignored. Dagster, which takes over SIGINT and SIGTERM while it
# executes a run, then leaves both ignored, and so would be all processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real Hub; those that need one start their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    for name in list(os.environ):
        if name.startswith(("FINETUNE_", "AWS_")):
            monkeypatch.delenv(name)


@pytest.fixture
def project(tmp_path: Path, for_all_workers: Path, monkeypatch: pytest.MonkeyPatch) -> TestProject:
    """A project of this test alone, which the environment points to."""
    created = TestProject.create(tmp_path)
    share_derived(for_all_workers, created.cache)
    for name, value in created.environment.items():
        monkeypatch.setenv(name, value)
    return created


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback that the real clients of this process and of its children ask, with a cache of its own."""
    from datasets import config as datasets_config

    with hub_server.running() as running:
        for name, value in {
            "HF_ENDPOINT": running.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hub_home"),
            "HF_TOKEN": "",
        }.items():
            monkeypatch.setenv(name, value)
        files = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_home" / "hub"))
        monkeypatch.setattr(datasets_config, "HF_ENDPOINT", running.url)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            datasets_config, "HUB_DATASETS_URL", running.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        HfFileSystem.clear_instance_cache()
        yield running


@pytest.fixture(scope="session")
def _moto() -> Iterator[str]:
    """moto's S3 server: quick, and kind. What only a real server refuses is tested with `ceph`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def for_all_workers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture
def first_run(for_all_workers: Path) -> Path:
    """The project that the first page of the documentation leaves behind: `make demo`, and the graph in one's own."""
    return followed(for_all_workers / "first-run")


@pytest.fixture(scope="session")
def _ceph(for_all_workers: Path) -> Iterator[str]:
    """The URL of a real S3 server, one for all test processes."""
    if missing := ceph_server.missing():
        pytest.skip(f"{missing} is not installed (Debian: radosgw ceph-mon ceph-osd ceph-common)")
    with ceph_server.shared(for_all_workers / "ceph") as url:
        yield url


@pytest.fixture
def moto(_moto: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of moto's, which the environment points to."""
    return _bucket(_moto, monkeypatch)


@pytest.fixture
def ceph(_ceph: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of a real S3 server, which the environment points to."""
    return _bucket(_ceph, monkeypatch)


@pytest.fixture
def proxied(ceph: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the real S3 server, which the environment points to instead; counts, and does what it is told."""
    with proxy_server.running(ceph.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.url)
        yield running


def _bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in ceph_server.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(f"tests-{uuid.uuid4().hex[:12]}", endpoint)
    bucket.client.create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture(scope="session")
def dolly() -> Path:
    """The 15,011 real rows of Dolly."""
    return _shared(SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real pretrained Llama of 260,032 parameters."""
    return _shared(SHARED / "models" / "stories260K")


def _shared(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real data: {path.name} does not lie beside the project in shared/")
    return path


def pytest_collection_finish() -> None:
    """Search for garbage less often, and not among what is imported: that takes a twentieth of the tests' time."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest begin first in each process, so that none is left with them; some run in `make soak` alone."""
    if not os.environ.get("SOAK"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    items[:] = _dealt(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _is_long(item: pytest.Item) -> bool:
    return item.path.parent.name in ("integration", "docs") or item.get_closest_marker("minutes") is not None


def _turn(item: pytest.Item) -> tuple[bool, bool, float]:
    """Tests of minutes come first, the first page before all; other pages, which wait for its project, come last.

    Of the same kind, those with a longer timeout of their own begin first.
    """
    is_short, is_page = item.get_closest_marker("minutes") is None, item.path.parent.name == "docs"
    timeout = item.get_closest_marker("timeout")
    return is_short, is_page == is_short, -timeout.args[0] if timeout else 0.0


def _dealt(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Tests in an order in which each slice, as pytest-xdist gives them to its processes, begins with long ones."""
    long = sorted((item for item in items if _is_long(item)), key=_turn)
    short = [item for item in items if not _is_long(item)]
    dealt: list[pytest.Item] = []
    for process in range(processes):
        size, mine = (len(items) - len(dealt)) // (processes - process), long[process::processes]
        dealt += mine + short[: max(0, size - len(mine))]
        del short[: max(0, size - len(mine))]
    return dealt


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a part that is missing is a failure: there, all of them are installed. Real data may be absent."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and "real data" not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where no part may be missing: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long the tests of each folder took, of all test processes together; `--durations` has the slowest."""
    reports = [
        one for reports in terminalreporter.stats.values() for one in reports if isinstance(one, pytest.TestReport)
    ]
    folders = Counter[str]()
    for report in reports:
        folder, _, rest = report.nodeid.removeprefix("tests/").partition("/")
        folders[folder if rest else "tests"] += report.duration
    if not folders:
        return
    terminalreporter.section("test seconds by folder")
    for folder, seconds in folders.most_common():
        terminalreporter.write_line(f"{seconds:8.1f} s {folder}")
    terminalreporter.write_line(f"{sum(folders.values()):8.1f} s in all")
