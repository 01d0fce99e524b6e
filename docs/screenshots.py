"""Pictures of Dagster's UI for the documentation: `make screenshots`. The tests of the browser use the same functions.

A picture is a row of one of the lists below: its name, where it is, what must be seen there, what is clicked. Servers
and the project are those of the tests, which are on the path. The project has one experiment, `demo`, until the
pictures that compare experiments are taken.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import yaml
from integration.cli import materialize
from integration.daemon import Daemon, running
from paths import ROOT
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from projects import TestProject

from finetune_assets.config.examples import copy_example

IMAGES = ROOT / "docs" / "images"
SAMPLE = ROOT / "finetune_assets" / "sample" / "dolly_sample.jsonl"
BROWSER = shutil.which("chromium")
COLORS, MILLISECONDS = 64, 60_000
SETTLING = 2_000  # milliseconds in which the page lays out its boxes
FAILED = dg.DagsterRunStatus.FAILURE
RANKS = "demo-ranks"


@dataclass(frozen=True)
class Shot:
    """One picture.

    Attributes:
        name: Of the file, without `.png`.
        address: Path of the page; `{run}` is the run that made the adapter.
        seen: Texts that must be visible before it is taken.
        clicks: Texts that are clicked first, in order.
        size: Of the window, in pixels; a wide one where the page shows less in a narrow one.
        top: Text that is scrolled to the top; empty for the page's beginning.
    """

    name: str
    address: str
    seen: tuple[str, ...]
    clicks: tuple[str, ...] = ()
    size: tuple[int, int] = (1440, 900)
    top: str = ""


AFTER_DEMO = (
    Shot("lineage", "/asset-groups", ("Passed", "Hugging Face"), ("Hide navigation",), (2600, 1300)),
    Shot("run", "/runs/{run}", ("RUN_SUCCESS",)),
    Shot("dolly_raw", "/assets/dolly_raw?view=overview", ("rows_with_context", "Timestamp")),
    Shot("tokenized_dataset", "/assets/tokenized_dataset?view=overview", ("Latest materialization", "Timestamp")),
    Shot("lora_adapter", "/assets/lora_adapter?view=overview", ("tokens_per_second", "Kinds")),
    Shot("training_plan", "/assets/training_plan?view=overview", ("predicted_peak_memory_mib", "Kinds")),
    Shot("lora_adapter-curves", "/assets/lora_adapter?view=overview", ("curves",), ("[Show Markdown]",)),
    Shot(
        "experiment_report",
        "/assets/experiment_report?view=overview",
        ("experiments_with_a_run",),
        ("[Show Markdown]",),
    ),
)
WITH_RANKS = (
    Shot(
        "lora_adapter-plots",
        "/assets/lora_adapter?view=overview",
        ("device_hours", "grad_norm"),
        ("Hide navigation", "Plots"),
        top="held_out_loss_after",
    ),
)
FAILED_CHECK = Shot(
    "failed-check",
    "/assets/dolly_raw?view=checks&checkDetail=quarantine",
    ("Failed", "quarantined (max_quarantine_share = 0.01)", "first_rows"),
)
AFTER_BAD_ROWS = (FAILED_CHECK,)
TOO_SMALL = ["hardware.gpu=small card", "hardware.memory_gib=0.05", "training.max_steps=30"]
AFTER_TOO_SMALL = (
    Shot(
        "failed-preflight",
        "/assets/training_plan?view=checks&checkDetail=fits",
        ("Failed", "Does not fit 1 x small card", "advice"),
    ),
)


@contextmanager
def serving(project: TestProject) -> Iterator[tuple[Daemon, str]]:
    """Dagster as `make ui` starts it, and its address; the environment points to the project."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["finetune", "ui", "--port", str(port)]
    with running(project, command, "Serving dagster-webserver on") as daemon:
        yield daemon, f"http://127.0.0.1:{port}"


@contextmanager
def browser() -> Iterator[Page]:
    """An empty page of a real browser."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(MILLISECONDS)
        expect.set_options(timeout=MILLISECONDS)
        yield page
        chromium.close()


def take(page: Page, server: str, shot: Shot, folder: Path, run: str = "") -> None:
    """Go there, see what must be seen, and write the picture."""
    page.set_viewport_size({"width": shot.size[0], "height": shot.size[1]})
    page.goto(server + shot.address.format(run=run))
    for text in shot.clicks:
        page.get_by_text(text).first.click()
    for text in shot.seen:
        expect(page.get_by_text(text).locator("visible=true").first).to_be_visible()
    page.wait_for_load_state("networkidle")
    expect(page.get_by_text("Loading").locator("visible=true")).to_have_count(0)
    page.wait_for_timeout(SETTLING)
    if shot.top:
        page.get_by_text(shot.top).locator("visible=true").first.evaluate("element => element.scrollIntoView()")
    shoot(page, folder / f"{shot.name}.png")


def shoot(page: Page, target: Path) -> None:
    """Write what the page shows, in few colors: a third of the size."""
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
    few = picture.convert("RGB").quantize(COLORS, method=Image.Quantize.MAXCOVERAGE)  # keeps a small mark's red
    few.save(target, optimize=True)


def take_report(page: Page, file: Path) -> None:
    """The report's overview and the page of an experiment, as a browser opens them from the disk."""
    subprocess.run([sys.executable, "-m", "finetune_assets.cli", "report", str(file)], check=True)
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(file.as_uri())
    shoot(page, IMAGES / "report.png")
    page.get_by_role("link", name="demo", exact=True).click()
    page.set_viewport_size({"width": 1440, "height": 1700})
    shoot(page, IMAGES / "report-experiment.png")


def spoil(inbox: Path, daemon: Daemon) -> None:
    """A second file of rows, all cut off in the middle; the run that the sensor then starts has failed."""
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    (inbox / "second.jsonl").write_text("\n".join(line[:40] for line in lines[:200]), encoding="utf-8")
    daemon.wait_for("the sensor's run", lambda: [run for run in daemon.runs() if run.dagster_run.status == FAILED])


def demo_alone(root: Path) -> TestProject:
    """A new project whose only experiment is `demo`; it makes no run but those that are requested here."""
    project = TestProject.create(root)
    for file in (project.configs / "experiments").glob("*.yaml"):
        if file.stem != "demo":
            file.unlink()
    shutil.rmtree(project.configs / "sweeps")
    demo = project.configs / "experiments" / "demo.yaml"
    demo.write_text(demo.read_text().replace("subscribed: true", "subscribed: false"))
    return project


def train(select: str = "*", partition: str = "demo", *overrides: str) -> None:
    done = materialize(select, partition, [*overrides])
    assert done.returncode == 0, done.stdout


def first_champion(project: TestProject) -> None:
    """Promote an adapter of few steps, so that the demo's own adapter has a champion to improve on."""
    demo = project.configs / "experiments" / "demo.yaml"
    settings = demo.read_text()
    shorter = yaml.safe_load(settings)
    shorter["training"] |= {"max_steps": 60}
    demo.write_text(yaml.safe_dump(shorter))
    train()
    demo.write_text(settings)


def prepare(project: TestProject) -> Path:
    """Run the demo in the project; the folder that its raw data is read from."""
    inbox = project.root / "inbox"
    inbox.mkdir()
    shutil.copy(SAMPLE, inbox / "first.jsonl")
    os.environ.update(project.environment, FINETUNE_RAW_DATA=str(inbox), HF_HUB_OFFLINE="1")
    first_champion(project)
    train()
    return inbox


def take_demo(project: TestProject) -> None:
    with serving(project) as (daemon, server), browser() as page:
        before = len(daemon.made("dolly_raw"))
        daemon.wait_for("the sensor's own run", lambda: len(daemon.made("dolly_raw")) > before and daemon.quiet())
        run = daemon.made("lora_adapter")[-1].run_id
        for shot in AFTER_DEMO:
            take(page, server, shot, IMAGES, run)


def take_others(project: TestProject, inbox: Path) -> None:
    """Pictures of several experiments, and of what fails."""
    copy_example(project.configs, RANKS, RANKS)
    train("*lora_adapter", f"{RANKS}.rank-4", "training.max_steps=20")
    with serving(project) as (daemon, server), browser() as page:
        for shot in WITH_RANKS:
            take(page, server, shot, IMAGES)
        take_report(page, project.root / "report.html")
        assert materialize("training_plan", overrides=TOO_SMALL).returncode == 1
        for shot in AFTER_TOO_SMALL:
            take(page, server, shot, IMAGES)
        spoil(inbox, daemon)
        for shot in AFTER_BAD_ROWS:
            take(page, server, shot, IMAGES)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "finetune_assets"
        root.mkdir()
        project = demo_alone(root)
        inbox = prepare(project)
        take_demo(project)
        take_others(project, inbox)
