"""What tests share: a project of their own, the real data beside the project, and the rule on skipping."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT, SHARED

from finetune_assets.store.artifacts import ArtifactStore





@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the real Hub; those that need one start their own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    for name in ("FINETUNE_CONFIGS", "FINETUNE_STORE", "FINETUNE_CACHE", "FINETUNE_NAMESPACE", "FINETUNE_RAW_DATA"):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class TestProject:
    """A copy of the project's configuration with a store and a Dagster home of its own."""

    __test__ = False
    root: Path

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @property
    def cache(self) -> Path:
        return self.root / ".finetune" / "cache"

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(f"file://{self.root}/.finetune/store", "tests", self.cache)

    def published(self, kind: str) -> list[str]:
        """Names of the artifacts of a kind in the store."""
        return sorted(path.parent.name for path in self.store_root.glob(f"tests/{kind}/*/manifest.json"))

    @property
    def store_root(self) -> Path:
        return self.root / ".finetune" / "store"

    def leftovers(self) -> list[Path]:
        """Files that belong to no artifact: half-written ones, and those of builds and jobs that ended."""
        whole = {path.parent for path in self.store_root.rglob("manifest.json")}
        stored = [path for path in self.store_root.rglob("*") if path.is_file()]
        orphans = [path for path in stored if not whole & {path.parent, *path.parents}]
        ended = [path for pattern in ("build-*", "jobs/*") for path in self.cache.glob(pattern)]
        return orphans + ended

    def write_experiment(self, name: str, text: str) -> None:
        (self.configs / "experiments" / f"{name}.yaml").write_text(text, encoding="utf-8")


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
