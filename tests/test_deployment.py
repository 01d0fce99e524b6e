"""What lies in deploy/ is what the programs that read it know."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import kubernetes_validate
import pytest
import yaml
from integration import cli
from integration.test_daemon import QUICK
from paths import ROOT
from projects import TestProject
from servers.kubernetes import VERSION

from finetune_assets.cli import webserver

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
    kinds = ["ServiceAccount", "Role", "RoleBinding", "ServiceAccount", "NetworkPolicy"]
    assert [tree["kind"] for tree in trees] == kinds
    for tree in trees:
        kubernetes_validate.validate(tree, VERSION, strict=True)


def test_jobs_have_an_account_without_a_role() -> None:
    """They run the code of models, and need the store alone."""
    trees = [*yaml.safe_load_all((DEPLOY / "kubernetes" / "launcher.yaml").read_text())]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for tree in trees:
        by_kind.setdefault(tree["kind"], []).append(tree)
    values = yaml.safe_load((DEPLOY / "kubernetes" / "values.yaml").read_text())
    (deployment,) = values["dagster-user-deployments"]["deployments"]
    account = {one["name"]: one.get("value") for one in deployment["env"]}["FINETUNE_SERVICE_ACCOUNT"]
    bound = {subject["name"] for binding in by_kind["RoleBinding"] for subject in binding["subjects"]}
    (own,) = [one for one in by_kind["ServiceAccount"] if one["metadata"]["name"] == account]
    assert own["automountServiceAccountToken"] is False
    assert account not in bound
    assert values["global"]["serviceAccountName"] in bound, "runs create the jobs"


def test_role_allows_what_the_launcher_asks() -> None:
    """Of the requests of the recorded clients, and of the policy of a job."""
    trees = [*yaml.safe_load_all((DEPLOY / "kubernetes" / "launcher.yaml").read_text())]
    (role,) = [tree for tree in trees if tree["kind"] == "Role"]
    allowed = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    recorded = json.loads((ROOT / "tests" / "launch" / "kubernetes_requests.json").read_text())["requests"]
    verbs = {"POST": "create", "DELETE": "delete", "PATCH": "patch"}
    for request in recorded:
        method, path, *parameters = request.split()
        resource = "pods/log" if path.endswith("/log") else path.partition("/")[0]
        read = "get" if "/" in path else "list"
        assert (resource, verbs.get(method, read)) in allowed, (request, parameters)
    assert ("networkpolicies", "create") in allowed


def test_services_agree_with_one_another() -> None:
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = compose["services"]
    assert services.keys() == {"postgres", "code", "pools", "daemon", "webserver"}
    (location,) = yaml.safe_load((DEPLOY / "compose-workspace.yaml").read_text())["load_from"]
    assert location["grpc_server"]["host"] in services
    assert services["webserver"]["ports"] == ["127.0.0.1:3000:3000"]
    assert services["webserver"]["command"][:3] == ["python", "-m", webserver.__name__]
    assert "FINETUNE_UI_HOSTS" in (DEPLOY / "env.example").read_text()
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


@pytest.mark.system
@pytest.mark.minutes
def test_one_command_deploys_from_ci(project: TestProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository of its own, where a commit adds one experiment."""
    workflow = yaml.safe_load((DEPLOY / "ci" / "train.yaml").read_text())
    assert "deploy/ci/train.sh" in [step.get("run") for step in workflow["jobs"]["train"]["steps"]]
    command = project.root / "deploy" / "ci" / "train.sh"
    command.parent.mkdir(parents=True)
    shutil.copy(DEPLOY / "ci" / "train.sh", command)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DAGSTER_HOME", "")
    for name, value in {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.replace("AUTHOR", "COMMITTER"), value)

    def train(**environment: str) -> "subprocess.CompletedProcess[str]":
        given = {**cli.environment(), **environment}
        return subprocess.run([command], env=given, cwd="/", capture_output=True, text=True, check=False)

    def commit() -> None:
        for arguments in (["init", "-q"], ["add", "configs"], ["commit", "-qm", "x"]):
            subprocess.run(["git", *arguments], cwd=project.root, check=True)

    commit()
    none = train(SINCE="HEAD")
    assert none.returncode == 0, none.stderr
    assert not project.store_root.exists(), "no experiment has changed"
    project.write_experiment("added", QUICK)
    commit()
    one = train(SINCE="HEAD~1")
    assert one.returncode == 0, one.stderr
    assert [line for line in one.stdout.splitlines() if line.startswith("==")] == ["== added"]
    assert len(project.published("adapters")) == len(project.published("evaluations")) == 1
    stored = {stored.key: stored.modified for stored in project.store.objects.listing()}
    again = train(EXPERIMENT="added")
    assert again.returncode == 0, again.stderr
    assert {stored.key: stored.modified for stored in project.store.objects.listing()} == stored
    assert train(EXPERIMENT="aded").returncode != 0
    unset = train()
    assert unset.returncode != 0
    assert "SINCE" in unset.stderr
