"""A user's own asset in `finetune_assets/defs/`: scaffolded, checked, listed, launched, and started by the daemon."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from integration.cli import environment
from integration.daemon import running
from paths import ROOT
from projects import TestProject

OWN = """
import dagster as dg

from finetune_assets.assets.partitions import experiments
from finetune_assets.resources.project import Project
from finetune_assets.store.artifacts import ArtifactRef


@dg.asset(partitions_def=experiments, automation_condition=dg.AutomationCondition.eager())
def my_asset(tokenized_dataset: ArtifactRef, project: Project) -> dg.MaterializeResult[int]:
    files = [path.name for path in project.store().fetch(tokenized_dataset).iterdir()]
    return dg.MaterializeResult(value=len(files), metadata={"fingerprint": tokenized_dataset.fingerprint})


@dg.asset(partitions_def=experiments)
def my_second_asset(my_asset: int) -> int:
    return my_asset + 1


@dg.asset_check(asset="tokenized_dataset", partitions_def=experiments)
def my_check(tokenized_dataset: ArtifactRef) -> dg.AssetCheckResult:
    found = {"fingerprint": tokenized_dataset.fingerprint}
    return dg.AssetCheckResult(passed=tokenized_dataset.files > 0, metadata=found)
"""
SUBSCRIBED = """
subscribed: true
model: {base_model: demo-base, dtype: float32}
data: {tokenization: {cutoff_len: 192}, checks: {max_truncated_share: 1.0}}
training: {max_steps: 2, macro_batch_size: 2, micro_batch_size: 2, precision: fp32}
evaluation: {generated_rows: 4, general_tokens: 500, max_new_tokens: 4}
"""

pytestmark = pytest.mark.system


@pytest.fixture
def checkout(project: TestProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's code, which the environment's Python imports instead of the original."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "finetune_assets", folder / "finetune_assets", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def dg_command(checkout: Path) -> Callable[..., str]:
    """Runs `dg` in the checkout; what it printed on stdout."""

    def run(*arguments: str) -> str:
        quiet = {"DAGSTER_DG_CLI_CONFIG": os.devnull, "COLUMNS": "200"}
        command = [str(Path(sys.executable).with_name("dg")), *arguments]
        ended = subprocess.run(command, cwd=checkout, env=environment() | quiet, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    return run


@pytest.fixture
def own(checkout: Path, dg_command: Callable[..., str]) -> Path:
    """A file that `dg` scaffolded, with assets and a check in it."""
    dg_command("scaffold", "defs", "dagster.asset", "mine.py")
    file = checkout / "finetune_assets" / "defs" / "mine.py"
    assert "@dg.asset" in file.read_text(encoding="utf-8")
    file.write_text(OWN, encoding="utf-8")
    return file


def test_an_own_asset_takes_ours_and_is_materialized_by_dg(
    project: TestProject, own: Path, dg_command: Callable[..., str]
) -> None:
    dg_command("check", "defs")
    listed = json.loads(dg_command("list", "defs", "--json"))
    assets = {asset["asset_key"] for asset in listed["assets"]}
    assert assets >= {"my_asset", "my_second_asset", "tokenized_dataset", "lora_adapter"}
    dg_command("launch", "--assets", "dolly_raw")
    assert len(project.published("raw")) == 1

    selection = "cached_base_model,tokenized_dataset,my_asset,my_second_asset"
    dg_command("launch", "--assets", selection, "--partition", "demo")
    (tokenized,) = project.published("tokenized")
    with dg.DagsterInstance.from_config(str(project.root / "dagster_home")) as instance:
        (mine,) = instance.fetch_materializations(dg.AssetKey("my_asset"), limit=5).records
        assert mine.asset_materialization
        assert mine.asset_materialization.metadata["fingerprint"].value == tokenized
        assert instance.fetch_materializations(dg.AssetKey("my_second_asset"), limit=5).records
        (check,) = instance.event_log_storage.get_asset_check_execution_history(
            dg.AssetCheckKey(dg.AssetKey("tokenized_dataset"), "my_check"), limit=5
        )
        evaluation = check.event.dagster_event.asset_check_evaluation_data  # type: ignore[union-attr]
        assert evaluation.passed
        assert evaluation.metadata["fingerprint"].value == tokenized


@pytest.mark.soak
def test_the_daemon_materializes_an_own_asset_after_ours(project: TestProject, checkout: Path, own: Path) -> None:
    for path in (project.configs / "experiments").glob("*.yaml"):
        path.unlink()
    project.write_experiment("one", SUBSCRIBED)
    with running(project, folder=checkout) as daemon:
        daemon.wait_for("my_asset", lambda: daemon.made("my_asset"))
        (tokenized,) = project.published("tokenized")
        (mine,) = daemon.made("my_asset")
        assert mine.partition_key == "one"
        assert mine.asset_materialization.metadata["fingerprint"].value == tokenized
