"""Secrets in the environment and in URLs: no command and no run leaves one in a file, a log or an event."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from commands import run
from integration.daemon import running
from integration.graph import Graph, definitions
from planted import tail
from projects import SHORT, TestProject
from tiers import every_third, tiered

from finetune_assets.store import objects

SECRETS = {
    name: f"{prefix}{tail(24)}"
    for name, prefix in {
        "hub token": "hf_", "AWS key": "AKIA", "AWS secret": "", "W&B key": "", "webhook": "T", "mail": "", "Hub": "",
        "W&B server": "", "S3 server": "", "store": "", "rows": "", "database": "", "launcher": "", "presigned": "",
    }.items()
}  # fmt: skip
"""Of each kind, a text that must be found nowhere."""
NOWHERE = "127.0.0.1:9"
"""An address at which no server listens."""
ENVIRONMENT = {
    "HF_TOKEN": SECRETS["hub token"],
    "AWS_ACCESS_KEY_ID": SECRETS["AWS key"],
    "AWS_SECRET_ACCESS_KEY": SECRETS["AWS secret"],
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL_S3": f"http://user:{SECRETS['S3 server']}@{NOWHERE}",
    "AWS_MAX_ATTEMPTS": "1",
    "WANDB_API_KEY": SECRETS["W&B key"].ljust(40, "0"),
    "WANDB_BASE_URL": f"http://user:{SECRETS['W&B server']}@{NOWHERE}",
    "FINETUNE_ALERT_WEBHOOK": f"https://{NOWHERE}/services/{SECRETS['webhook']}",
    "FINETUNE_SMTP": f"smtp://user:{SECRETS['mail']}@{NOWHERE}",
    "HF_ENDPOINT": f"http://user:{SECRETS['Hub']}@{NOWHERE}",
    "HF_HUB_OFFLINE": "0",
    "DATABASE_URL": f"postgresql://user:{SECRETS['database']}@{NOWHERE}/dagster",
}
BAD_STORES = [f"s3://user:{SECRETS['store']}@bucket/x", f"s3://bucket/x?secret={SECRETS['store']}", "s3://bucket/x"]
BAD_ROWS = [
    f"s3://user:{SECRETS['rows']}@bucket/rows",
    f"hf://datasets/user:{SECRETS['rows']}@owner/name",
    f"https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Signature={SECRETS['presigned']}",
    f"https://user:{SECRETS['rows']}@host/rows.jsonl",
    "hf://datasets/owner/name",
    "s3://bucket/rows",
]
COMMANDS = [
    ("plan", "demo"), ("report", "{out}/report.html"), ("compare", "demo", "demo"), ("sweep", "list"),
    ("sweep", "report", "demo-ranks"), ("store", "list"), ("store", "list", "--json"), ("store", "show", "adapters/"),
    ("store", "verify"), ("store", "verify", "--cache"), ("store", "cache"), ("store", "gc"),
    ("store", "fetch", "evaluations/", "{out}/evaluation"), ("adapter", "champions"), ("adapter", "history", "demo"),
    ("adapter", "promote", "demo", "ffff", "--reason", "so"), ("adapter", "rollback", "demo", "--reason", "so"),
    ("adapter", "fetch", "demo", "{out}/adapter"), ("adapter", "verify", "{out}/adapter"),
    ("adapter", "updates", "demo"), ("adapter", "publish", "demo", "owner/name"),
    ("run", "demo", "--set", "training.learning_rat=1"),
    ("run", "demo", "--set", f"launcher.environment={{DB_PASSWORD: {SECRETS['launcher']}}}"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _planted(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(project.root / "hub_home"))
    monkeypatch.setenv("WANDB_DIR", str(project.root))


def shown(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text or secret[:16] in text]


def found(*folders: Path) -> list[tuple[str, str]]:
    """Secrets in all files of folders, each with the file."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    contents = ((path, path.read_bytes()) for path in files)
    return [(name, str(path)) for path, content in contents for name, key in SECRETS.items() if key.encode() in content]


def commands(capsys: pytest.CaptureFixture[str], out: Path) -> dict[str, int]:
    """Run every command; none shows a secret. Exit codes."""
    codes = {}
    for arguments in COMMANDS:
        ended = run(capsys, *(argument.format(out=out) if "{out}" in argument else argument for argument in arguments))
        assert shown(ended.out + ended.err) == [], (arguments, ended)
        codes[" ".join(arguments[:3])] = ended.code
    return codes


@pytest.mark.parametrize("store", BAD_STORES[:2])
def test_a_store_with_a_secret_shows_it_in_no_command(
    store: str, project: TestProject, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORE", store)
    codes = commands(capsys, project.root)
    assert codes["store list"] == codes["adapter champions"] == codes["plan demo"] == 1
    assert found(project.root) == []


@pytest.mark.parametrize("rows", tiered(BAD_ROWS, every_third(BAD_ROWS)))
def test_rows_with_a_secret_show_it_in_no_run(
    rows: str, project: TestProject, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_RAW_DATA", rows)
    definitions()  # which import these modules again
    for module in ("raw_sources", "materialization"):
        monkeypatch.setattr(f"finetune_assets.assets.{module}.RETRIES", 0)
    monkeypatch.setitem(objects.RETRIES, "max_retries", 0)
    (home := project.root / "dagster_home" / "own").mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        ended = Graph(instance).run("dolly_raw", partition=None)
        assert not ended.success
        assert shown(ended.log + str(ended.failures)) == []
    assert shown("".join(capfd.readouterr())) == []
    assert found(project.root) == []


def started(*arguments: str, written: str = "") -> "subprocess.CompletedProcess[str]":
    """`finetune ARGUMENTS` in a process of its own, to which `written` is written."""
    command = [sys.executable, "-m", "finetune_assets.cli", *arguments]
    return subprocess.run(
        command, input=written, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.minutes
def test_the_demo_and_its_ui_leave_no_secret(project: TestProject) -> None:
    demo = project.configs / "experiments" / "demo.yaml"
    settings = yaml.safe_load(demo.read_text())
    settings["training"] |= {"max_steps": 2}
    settings["evaluation"] |= {"generated_rows": 4, "general_tokens": 500}
    demo.write_text(yaml.safe_dump(settings))
    ended = started("demo")
    assert (ended.returncode, shown(ended.stdout)) == (0, []), ended.stdout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running(project, ["finetune", "--demo", "ui", "--port", str(port)], "Serving dagster-webserver on") as ui:
        looked = "Sensor raw_data_sensor"
        ui.wait_for("a look at the rows", lambda: looked in ui.log.read_text(), asks=False)
        assert shown(ui.log.read_text()) == []
    assert found(project.root) == []


@pytest.mark.system
@pytest.mark.minutes
def test_a_run_and_every_command_leave_no_secret(
    project: TestProject, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_RAW_DATA", "sample")
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text() + "\nwandb: {project: tests, mode: online, log_model: true}\n")
    (home := project.root / "dagster_home" / "own").mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        ended = Graph(instance).run(overrides=SHORT)
        assert ended.success, ended.failures
        assert shown(ended.log) == []
    (adapter,) = project.published("adapters")
    (project.root / "out").mkdir()
    promote = run(capfd, "adapter", "promote", "demo", adapter[:12], "--reason", "so")
    assert (promote.code, shown(promote.out + promote.err)) == (0, [])
    codes = commands(capfd, project.root / "out")
    assert codes["adapter history demo"] == codes["store verify"] == codes["report {out}/report.html"] == 0
    assert codes["adapter publish demo"] == 1, "no Hub answers"
    assert shown("".join(capfd.readouterr())) == []
    talk = started("chat", "demo", "--max-new-tokens", "4", written="Hello\n/quit\n")
    assert (talk.returncode, shown(talk.stdout)) == (0, []), talk.stdout
    folders = [project.root] + [Path(folder) for folder in (os.environ["HF_HOME"],) if Path(folder).exists()]
    assert found(*folders) == []
    shutil.rmtree(project.root / "out")
