"""What lies in deploy/ is what the programs that read it know."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import kubernetes_validate
import pytest
import yaml
from paths import ROOT
from servers.kubernetes import VERSION

DEPLOY = ROOT / "deploy"


def test_workspace_is_what_the_ui_loads() -> None:
    (entry,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    loaded = subprocess.run(
        [Path(sys.executable).with_name("dagster"), "definitions", "validate", "-w", "workspace.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stdout + loaded.stderr
    assert entry == {"python_module": "finetune_assets.definitions"}
    assert "finetune_assets.definitions" in loaded.stdout + loaded.stderr


def test_instance_is_one_that_dagster_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the database, which test_production has."""
    settings = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
    for name in re.findall(r"env: (\w+)", (DEPLOY / "dagster.yaml").read_text()):
        monkeypatch.setenv(name, "5432")
    del settings["storage"]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(settings))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert type(instance.compute_log_manager).__name__ == "S3ComputeLogManager"
        assert instance.run_monitoring_enabled
        assert instance.run_retries_enabled


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("kubernetes/launcher.yaml")), ids=lambda path: path.name)
def test_manifests_are_what_kubernetes_knows(path: Path) -> None:
    trees = [tree for tree in yaml.safe_load_all(path.read_text()) if tree]
    assert [tree["kind"] for tree in trees] == ["ServiceAccount", "Role", "RoleBinding"]
    for tree in trees:
        kubernetes_validate.validate(tree, VERSION, strict=True)


def test_services_agree_with_one_another() -> None:
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert services.keys() == {"postgres", "code", "daemon", "webserver"}
    (location,) = yaml.safe_load((DEPLOY / "compose-workspace.yaml").read_text())["load_from"]
    assert location["grpc_server"]["host"] in services
    assert services["webserver"]["ports"] == ["127.0.0.1:3000:3000"]
    read = set(re.findall(r"env: (\w+)", (DEPLOY / "dagster.yaml").read_text()))
    given = {*services["code"]["environment"], *re.findall(r"^(\w+)=", (DEPLOY / "env.example").read_text(), re.M)}
    assert read <= given


def test_images_programs_are_there() -> None:
    """The Dockerfile copies what there is, and starts what Dagster has."""
    text = (DEPLOY / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?:--chown=\S+ )?([^-\n].*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    assert "USER 1000" in text
    help_ = subprocess.run(
        [Path(sys.executable).with_name("dagster"), "code-server", "start", "--help"], capture_output=True, text=True
    )
    assert "--port" in help_.stdout


def test_one_command_deploys_from_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DEPLOY / "ci" / "train.yaml").read_text()
    workflow = yaml.safe_load(text)
    assert "deploy/ci/train.sh" in [step.get("run") for step in workflow["jobs"]["train"]["steps"]]
    check = subprocess.run(["bash", "-n", DEPLOY / "ci" / "train.sh"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
