"""What a person does in Dagster's UI, in a real browser: see the lineage, materialize, watch, open a check."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from integration.cli import materialize
from integration.daemon import Daemon, running
from paths import ROOT
from playwright.sync_api import Page, expect, sync_playwright
from projects import TestProject

BROWSER = shutil.which("chromium")
SAMPLE = ROOT / "finetune_assets" / "sample" / "dolly_sample.jsonl"
PICTURES = Path(os.environ.get("FINETUNE_SCREENSHOTS") or ROOT / "build" / "screenshots")
SECONDS = 60
FAILED = dg.DagsterRunStatus.FAILURE

pytestmark = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (Debian: chromium)")


@pytest.fixture
def inbox(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The watched folder; `demo` trains when it is told to, for a few steps."""
    demo = project.configs / "experiments" / "demo.yaml"
    text = demo.read_text().replace("subscribed: true", "subscribed: false").replace("epochs: 15", "max_steps: 20")
    demo.write_text(text)
    folder = project.root / "inbox"
    folder.mkdir()
    shutil.copy(SAMPLE, folder / "first.jsonl")
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(folder))
    return folder


@pytest.fixture
def ui(project: TestProject, inbox: Path) -> Iterator[tuple[Daemon, str]]:
    """Dagster as `make ui` starts it, and its address."""
    assert materialize("tokenized_dataset,cached_base_model,dolly_raw").returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["python", "-m", "finetune_assets.tools.ui", "--port", str(port)]
    with running(project, command, "Serving dagster-webserver on") as daemon:
        yield daemon, f"http://127.0.0.1:{port}"


@pytest.fixture
def page() -> Iterator[Page]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(SECONDS * 1000)
        expect.set_options(timeout=SECONDS * 1000)
        yield page
        browser.close()


def shoot(page: Page, name: str) -> None:
    page.screenshot(path=PICTURES / f"{name}.png", animations="disabled")


def test_materialize_watch_and_find_out_why(
    ui: tuple[Daemon, str], page: Page, inbox: Path, project: TestProject
) -> None:
    daemon, address = ui
    materialize_in_lineage(page, address)
    (run, *_) = daemon.wait_for("the run", lambda: [run for run in daemon.runs() if trains(run)])
    watch(page, f"{address}/runs/{run.dagster_run.run_id}")
    assert len(project.published("adapters")) == 1

    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    (inbox / "second.jsonl").write_text("\n".join(line[:40] for line in lines[:200]), encoding="utf-8")
    daemon.wait_for("the sensor's run", lambda: [run for run in daemon.runs() if run.dagster_run.status == FAILED])
    find_out_why(page, address)


def trains(run: Any) -> bool:
    return dg.AssetKey("lora_adapter") in (run.dagster_run.asset_selection or ())


def materialize_in_lineage(page: Page, address: str) -> None:
    page.goto(f"{address}/asset-groups")
    for asset in ("dolly_raw", "tokenized_dataset", "cached_base_model", "lora_adapter", "adapter_evaluation"):
        expect(page.get_by_role("button", name=asset).first).to_be_visible()
    shoot(page, "lineage")
    page.get_by_role("button", name="lora_adapter").first.click()
    page.get_by_role("button", name="Materialize selected").click()
    page.get_by_text("Select a partition").click()
    page.get_by_text("demo", exact=True).locator("visible=true").first.click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Launch 1 run").click()


def watch(page: Page, run: str) -> None:
    page.goto(run)
    expect(page.get_by_text("Success", exact=True).first).to_be_visible(timeout=4 * SECONDS * 1000)
    shoot(page, "run")


def find_out_why(page: Page, address: str) -> None:
    page.goto(f"{address}/assets/dolly_raw?view=checks&checkDetail=quarantine")
    expect(page.get_by_text("Failed", exact=True).first).to_be_visible()
    expect(page.get_by_text("are bad and set aside, max_quarantine_share is 0.01").first).to_be_visible()
    expect(page.get_by_text("first_rows")).to_be_visible()
    shoot(page, "failed-check")
    page.get_by_text("[Show Markdown]").first.click()
    expect(page.get_by_role("cell", name="second.jsonl").first).to_be_visible()
    shoot(page, "failed-check-rows")
