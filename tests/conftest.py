"""What tests share: a project of their own, the real data beside the project, and the rule on skipping."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT, SHARED
from projects import TestProject


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
