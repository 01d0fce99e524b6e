"""The page about all experiments: what it is made of, and what it says."""

import base64
import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from projects import TestProject
from reporting.conftest import aged
from tiers import tiered

from finetune_assets.artifacts.champions import Champions
from finetune_assets.artifacts.kinds import ADAPTERS
from finetune_assets.reporting.collect import collect
from finetune_assets.reporting.pages import as_html, as_page, write
from finetune_assets.store.artifacts import ArtifactRef

Made = Callable[..., ArtifactRef]
STRANGE = """<script>alert("x")</script> & 'it' | **so**"""


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.values: list[float] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        found = dict(attributes)
        self.links += [value for name, value in found.items() if name in ("src", "href", "action") and value]
        if found.get("data-value"):
            self.values.append(float(found["data-value"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text.append(text)


def state_of(project: TestProject, ref: ArtifactRef) -> dict[str, Any]:
    return json.loads((project.store.fetch(ref) / "trainer_state.json").read_text(encoding="utf-8"))


@pytest.fixture
def two_runs(project: TestProject, publish: Made, measure: Made) -> tuple[ArtifactRef, ArtifactRef]:
    """A champion of yesterday and a challenger of today of demo, which has a strange description, and a price."""
    demo = project.configs / "experiments" / "demo.yaml"
    lines = [line for line in demo.read_text().splitlines() if not line.startswith("description")]
    demo.write_text("\n".join([f"description: {json.dumps(STRANGE)}", *lines, "hardware: {price_per_hour: 3600}\n"]))
    project.write_experiment("broken", "trainig: {}")
    old = publish("a")
    aged(project, old, 1)
    new = publish("b", "training.seed=5", "training.logging_steps=1")
    Champions(project.store, "demo").promote_by_hand(old, STRANGE, "tests")
    measure(new, old)
    return old, new


def test_the_page_tells_what_the_store_holds(
    project: TestProject, two_runs: tuple[ArtifactRef, ArtifactRef], tmp_path: Path
) -> None:
    old, new = two_runs
    report = collect(project.store, project.configs)
    assert report.problems == ()
    again = collect(project.store, project.configs)
    assert (again.fingerprint, as_html(again)) == (report.fingerprint, as_html(report)), "the same state, the same page"
    demo, *others = report.experiments
    assert [run.fingerprint for run in demo.runs] == [new.fingerprint, old.fingerprint]
    assert [demo.serves(run) for run in demo.runs] == [False, True]
    state = state_of(project, new)
    assert demo.runs[0].losses == tuple(entry["loss"] for entry in state["history"])
    numbers = demo.runs[0].numbers
    assert numbers["tokens"] == state["tokens"]
    assert numbers["mfu"] == round(median(entry["mfu"] for entry in state["history"]), 3)
    assert numbers["loss_challenger"] == pytest.approx(state["held_out_loss"]["after"], abs=1e-3)
    assert numbers["loss_base"] == pytest.approx(state["held_out_loss"]["before"], abs=1e-3)
    assert numbers["loss_champion"] == pytest.approx(state_of(project, old)["held_out_loss"]["after"], abs=1e-3)
    assert numbers["cost"] == pytest.approx(3600 * numbers["device_hours"])
    assert numbers.keys() >= {"forgetting", "exact_match_challenger", "rouge_l_challenger", "peak_memory_mib"}
    broken = next(one for one in others if one.name == "broken")
    assert broken.error == "experiments/broken.yaml: trainig: unknown setting (value {}); did you mean 'training'?"

    write(report, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    for name in ("tokens_per_second", "loss_challenger", "loss_champion", "peak_memory_mib", "cost"):
        assert numbers[name] in page.values
    text = " ".join(page.text)
    assert STRANGE in text
    assert text.count(STRANGE) == 2, "as description and as reason"
    assert page.tags.count("script") == 1, "its own"
    assert broken.error in text
    assert "data.tokenization.cutoff_len" in text
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links), "nothing from elsewhere"
    drawn = [base64.b64decode(link.partition(",")[2]) for link in page.links if link.startswith("data:")]
    assert [ElementTree.fromstring(picture).tag for picture in drawn] == ["{http://www.w3.org/2000/svg}svg"] * 2

    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"**demo** (champion: {old.fingerprint[:12]})" in markdown
    assert f"{numbers['loss_challenger']:.4f}" in markdown
    for picture in markdown.split("data:image/png;base64,")[1:]:
        assert Image.open(io.BytesIO(base64.b64decode(picture.partition(")")[0]))).width == 800
    assert json.loads((tmp_path / "report.json").read_text())["experiments"][0]["runs"][0]["numbers"] == numbers


def test_nothing_trained_yet(project: TestProject) -> None:
    report = collect(project.store, project.configs)
    assert report.trained == []
    assert "No experiment has a run yet." in " ".join(Page(as_html(report)).text)
    assert as_page(report) == "No experiment has a run yet."


@pytest.mark.parametrize("count", tiered([10, 100], {10}, ()))
def test_many_experiments(project: TestProject, publish: Made, measure: Made, tmp_path: Path, count: int) -> None:
    """Copies of one training: the page stays small, and what cannot be read takes nothing else down."""
    adapter = publish("a")
    evaluation = measure(adapter)
    small = ("trainer_state.json", "provenance.json", "config.yaml")
    copied = {name: project.store.fetch(adapter) / name for name in small}
    measured = project.store.fetch(evaluation)
    for number in range(count):
        name = f"{number + 4096:064x}"
        project.write_experiment(f"e{number}", f"model: {{base_model: demo-base}}\nlora: {{rank: {number + 1}}}\n")
        project.store.publish(copied, ADAPTERS.folder, name, name, {"experiment": f"e{number}"})
        project.store.publish(measured, "evaluations", name, name, {"lora_adapter": name})
    report = collect(project.store, project.configs)
    assert report.problems == ()
    assert len(report.trained) == count + 1
    assert all("loss_challenger" in one.runs[0].numbers for one in report.trained)
    page = Page(as_html(report))
    assert {f"e{number}" for number in range(count)} <= set(page.text)
    assert len(as_page(report)) < 150_000

    bad = {name: tmp_path / name for name in small}
    for path in bad.values():
        path.write_text("{}")
    project.store.publish(bad, ADAPTERS.folder, "b" * 64, "b" * 64, {"experiment": "gone"})
    project.store.objects.put("tests/champions/demo/00000001.json", b"{}")
    (project.configs / "base.yaml").write_text("- not settings")
    damaged = collect(project.store, project.configs)
    assert len(damaged.problems) == 3, "an adapter, a champion's record, and what all begin with"
    assert len(damaged.trained) == count + 1
    assert {one.name for one in damaged.experiments if one.error} >= {"demo", "gone", "e1"}
    assert damaged.fingerprint != report.fingerprint
    Page(as_html(damaged))
