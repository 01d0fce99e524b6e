"""`finetune ui` leaves no process behind, however it is ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from integration.webserver import DEFINITIONS
from processes import running
from tiers import SOAK
from waiting import wait_for


def ignore_interrupts() -> None:
    """As a shell starts what is in its background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SOAK)], ids=["SIGTERM", "SIGINT"])
def test_all_its_processes_end_where_interrupts_are_ignored(tmp_path: Path, number: signal.Signals) -> None:
    home = tmp_path / "a home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    (tmp_path / "definitions.py").write_text(DEFINITIONS)
    (tmp_path / "workspace.yaml").write_text("load_from:\n  - python_file: definitions.py\n")
    command = [sys.executable, "-m", "finetune_assets.cli", "ui", "--port", "0"]
    environment = {**os.environ, "DAGSTER_HOME": str(home)}
    log = tmp_path / "log"
    with log.open("wb") as file:
        started = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=file, stderr=file, preexec_fn=ignore_interrupts
        )

    def own() -> set[int]:
        return {process.pid for process in running().values() if f"DAGSTER_HOME={home}" in process.environment}

    wait_for(lambda: "Serving dagster-webserver" in log.read_text() and len(own()) >= 5, 240, 1, log)
    started.send_signal(number)
    assert started.wait(120) == 0, log.read_text()[-3000:]
    assert own() == set()
