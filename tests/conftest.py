"""What tests share: a project of their own, the real data beside the project, and the rule on skipping."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, constants
from paths import ROOT, SHARED
from projects import TestProject
from servers import hub as hub_server
from servers.hub import Hub


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real Hub; those that need one start their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    for name in ("FINETUNE_CONFIGS", "FINETUNE_STORE", "FINETUNE_CACHE", "FINETUNE_NAMESPACE", "FINETUNE_RAW_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestProject:
    """A project of this test alone, which the environment points to."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    home = tmp_path / "dagster_home"
    home.mkdir()
    shutil.copy(ROOT / ".dagster_home" / "dagster.yaml", home)
    monkeypatch.setenv("FINETUNE_CONFIGS", str(tmp_path / "configs"))
    monkeypatch.setenv("FINETUNE_NAMESPACE", "tests")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    return TestProject(tmp_path)


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
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_home" / "hub"))
        monkeypatch.setattr(datasets_config, "HF_ENDPOINT", running.url)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            datasets_config, "HUB_DATASETS_URL", running.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        HfFileSystem.clear_instance_cache()
        yield running


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a part that is missing is a failure: there, all of them are installed. Real data may be absent."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and "real data" not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where no part may be missing: {report.longrepr}"
    return report
