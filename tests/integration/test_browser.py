"""What a person does in Dagster's UI, in a real browser: see the lineage, materialize, watch, open a check."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from integration.daemon import Daemon
from paths import ROOT
from playwright.sync_api import Page, expect
from projects import TestProject

from docs.screenshots import BROWSER, FAILED_CHECK, MILLISECONDS, SAMPLE, browser, serving, shoot, spoil, take
from finetune_assets.definitions import defs

PICTURES = Path(os.environ.get("FINETUNE_SCREENSHOTS") or ROOT / "build" / "screenshots")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (Debian: chromium)")


@pytest.fixture
def inbox(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The watched folder; `demo` trains when it is told to, for a few steps."""
    demo = project.configs / "experiments" / "demo.yaml"
    text = demo.read_text().replace("subscribed: true", "subscribed: false").replace("epochs: 15", "max_steps: 4")
    demo.write_text(text)
    folder = project.root / "inbox"
    folder.mkdir()
    shutil.copy(SAMPLE, folder / "first.jsonl")
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(folder))
    return folder


@pytest.fixture
def ui(project: TestProject, inbox: Path) -> Iterator[tuple[Daemon, str]]:
    """Dagster as `make ui` starts it, and its address; what a training needs is there."""
    with dg.DagsterInstance.get() as instance:
        done = dg.materialize(
            [asset for asset in defs.assets or [] if isinstance(asset, dg.AssetsDefinition)],
            selection=["dolly_raw", "cached_base_model", "tokenized_dataset"],
            resources=dict(defs.resources or {}),
            partition_key="demo",
            instance=instance,
        )
        # The page asks back where an asset before it was never made
        instance.report_runless_asset_event(dg.AssetMaterialization("training_plan", partition="demo"))
    assert done.success
    with serving(project) as served:
        yield served


@pytest.fixture
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


def test_materialize_watch_and_find_out_why(
    ui: tuple[Daemon, str], page: Page, inbox: Path, project: TestProject
) -> None:
    daemon, address = ui
    materialize_in_lineage(page, address)
    (run, *_) = daemon.wait_for("the run", lambda: [run for run in daemon.runs() if trains(run)])
    watch(page, f"{address}/runs/{run.dagster_run.run_id}", daemon)
    assert len(project.published("adapters")) == 1

    spoil(inbox, daemon)
    find_out_why(page, address)


def trains(run: Any) -> bool:
    return dg.AssetKey("lora_adapter") in (run.dagster_run.asset_selection or ())


def materialize_in_lineage(page: Page, address: str) -> None:
    page.goto(f"{address}/asset-groups")
    for asset in ("dolly_raw", "tokenized_dataset", "cached_base_model", "lora_adapter", "adapter_evaluation"):
        expect(page.get_by_role("button", name=asset).first).to_be_visible()
    shoot(page, PICTURES / "lineage.png")
    page.get_by_role("button", name="lora_adapter").first.click()
    page.get_by_role("button", name="Materialize selected").click()
    page.get_by_text("Select a partition").click()
    page.get_by_text("demo", exact=True).locator("visible=true").first.click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Launch 1 run").click()


def watch(page: Page, run: str, daemon: Daemon) -> None:
    """See the run's step while it goes on, and that it succeeded once it ended; in between, nothing is drawn."""
    page.goto(run)
    expect(page.get_by_text("lora_adapter").first).to_be_visible()
    page.goto("about:blank")
    daemon.wait_for("the end of the run", daemon.quiet)
    page.goto(run)
    expect(page.get_by_text("Success", exact=True).first).to_be_visible(timeout=4 * MILLISECONDS)
    shoot(page, PICTURES / "run.png")


def find_out_why(page: Page, address: str) -> None:
    take(page, address, FAILED_CHECK, PICTURES)
    page.get_by_text("[Show Markdown]").first.click()
    expect(page.get_by_role("cell", name="second.jsonl").first).to_be_visible()
    shoot(page, PICTURES / "failed-check-rows.png")
