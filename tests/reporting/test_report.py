"""The pages of the report: what they are made of, and what they say."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from PIL import Image
from projects import TestProject
from reporting.conftest import aged
from tiers import tiered

from finetune_assets.artifacts.champions import PROMOTED, Champions, Record
from finetune_assets.artifacts.kinds import ADAPTERS, EVALUATIONS
from finetune_assets.display import plain
from finetune_assets.reporting.collect import collect
from finetune_assets.reporting.page_names import page_file
from finetune_assets.reporting.pages import overview, write
from finetune_assets.serving.state import ROLLED_BACK, SERVES, Served, ServedRecords, served_name
from finetune_assets.store.artifacts import ArtifactRef

Made = Callable[..., ArtifactRef]
OTHER_RUN = ("training.seed=5", "training.logging_steps=1")
STRANGE = """<script>alert("x")</script> & 'it' | **so**"""
MODES = {
    mode: {"rows": rows, "contenders": {"base": {"loss": 3.0}, "challenger": {"loss": loss, **cites}}}
    for mode, rows, loss, cites in (("closed_book", 60, 2.5, {}), ("retrieved", 50, 1.25, {"citations": 0.75}))
}
PREFERENCES = {
    "pairs": 40,
    "labelled": 2,
    "beta": 0.1,
    "margins": {"edges": [-1.0, 0.0, 1.0], "counts": {"challenger": [8, 34]}},
}


class Page(HTMLParser):
    """What a browser would see of a page.

    Attributes:
        tables: Rows of cells of the tables, by the id of the heading above.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.values: list[float] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        found = dict(attributes)
        self.links += [value for name, value in found.items() if name in ("src", "href", "action") and value]
        self.ids += [value for name, value in found.items() if name == "id" and value]
        if found.get("data-value"):
            self.values.append(float(found["data-value"] or ""))
        if tag == "h2":
            self.section = found.get("id") or ""
        elif tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text.append(text)
        if {"td", "th"} & {*self.open}:
            self.tables[self.section][-1][-1] += text

    def table(self, section: str) -> list[dict[str, str]]:
        """The rows of a section's first table, by the titles of its columns."""
        titles, *rows = [[" ".join(cell.split()) for cell in row] for row in self.tables[section]]
        return [dict(zip(titles, row, strict=True)) for row in rows if len(row) == len(titles)]


def read(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def publish_evaluation(project: TestProject, adapter: ArtifactRef) -> ArtifactRef:
    """Publish an evaluation as of an experiment with retrieval and preferences."""
    contenders = {
        "base": {"loss": 3.0, "preference_accuracy": 0.5, "reward_margin": 0.0, "answer_words": 30},
        "challenger": {"loss": 1.25, "preference_accuracy": 0.81, "reward_margin": 0.4},
    }
    file = project.root / "evaluation.json"
    evaluation = {"contenders": contenders, "modes": MODES, "unseen_passages": MODES, "preferences": PREFERENCES}
    file.write_text(json.dumps(evaluation))
    made_from = {"lora_adapter": adapter.fingerprint}
    return project.store.publish({file.name: file}, EVALUATIONS.folder, "e" * 64, "e" * 64, made_from)


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
    new = publish("b", *OTHER_RUN)
    Champions(project.store, "demo").promote_by_hand(old, STRANGE, "tests")
    measure(new, old)
    return old, new


def test_the_pages_tell_what_the_store_holds(
    project: TestProject, two_runs: tuple[ArtifactRef, ArtifactRef], tmp_path: Path
) -> None:
    old, new = two_runs
    report = collect(project.store, project.configs)
    assert report.problems == ()
    assert collect(project.store, project.configs).fingerprint == report.fingerprint, "the same state"
    demo, *others = report.experiments
    assert [run.fingerprint for run in demo.runs] == [new.fingerprint, old.fingerprint]
    assert [demo.is_champion(run) for run in demo.runs] == [False, True]
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

    drawn = project.store.cache.derived
    folder = tmp_path / "pages"
    write(report, folder, drawn)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    write(report, folder, drawn)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before, "the same state, the same pages"
    overview, pages = read(folder / "report.html"), folder / "report-experiments"
    assert {path.name for path in pages.iterdir()} == {page_file(entry.name) for entry in report.experiments}
    assert {link for link in overview.links if not link.startswith("data:")} == {
        f"report-experiments/{path.name}" for path in pages.iterdir()
    }
    for name in ("tokens_per_second", "loss_challenger", "loss_champion", "peak_memory_mib", "cost"):
        assert numbers[name] in overview.values
    assert overview.tags.count("script") == 1, "its own"
    drawings = [
        base64.b64decode(link.partition(",")[2]) for link in overview.links if link.startswith("data:image/svg")
    ]
    assert [ElementTree.fromstring(picture).tag for picture in drawings] == ["{http://www.w3.org/2000/svg}svg"] * 2

    of_demo = read(pages / "demo.html")
    assert " ".join(of_demo.text).count(STRANGE) == 2, "as description and as reason"
    assert "script" not in of_demo.tags
    assert "data.tokenization.cutoff_len" in {row["setting"] for row in of_demo.table("settings")}
    assert broken.error in " ".join(read(pages / "broken.html").text)
    assert sum(link.startswith("data:image/svg+xml;base64,") for link in of_demo.links) == 2

    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert f"**demo** (champion: {old.fingerprint[:12]})" in markdown
    assert f"{numbers['loss_challenger']:.4f}" in markdown
    for picture in markdown.split("data:image/png;base64,")[1:]:
        assert Image.open(io.BytesIO(base64.b64decode(picture.partition(")")[0]))).width == 800
    assert json.loads((folder / "report.json").read_text())["experiments"][0]["runs"][0]["numbers"] == numbers


def test_the_page_of_an_experiment_has_its_histories_modes_and_preferences(
    project: TestProject, publish: Made, tmp_path: Path
) -> None:
    old, new = publish("a"), publish("b", *OTHER_RUN)
    aged(project, old, 1)
    champions, served = Champions(project.store, "demo"), ServedRecords(project.store, "demo")
    champions.promote_by_hand(old, STRANGE, "tests")
    gained = {"mean": 0.22, "lower": 0.19}
    champions.promote(Record("demo", new.fingerprint, PROMOTED, numbers=gained, reason="better", by="run 1"), after=1)
    champions.roll_back(STRANGE, "tests")
    measured = {"http://one:8000": {"distance_to_challenger": 0.0003, "tolerance": 0.005, "rows": 12}, "two": STRANGE}
    for number, (ref, action) in enumerate(((old, SERVES), (new, SERVES), (old, ROLLED_BACK))):
        name = served_name("demo", number + 1, ref.fingerprint)
        numbers = measured if action == SERVES else {}
        record = Served("demo", name, ref.fingerprint, ref.kind, ref.fingerprint, number + 1, action, numbers=numbers)
        served.append(replace(record, servers=["http://one:8000", STRANGE], probe={"tokens": [5, 6]}), number)
    evaluation = publish_evaluation(project, new)

    report = collect(project.store, project.configs)
    assert report.problems == ()
    write(report, tmp_path, project.store.cache.derived)
    page = read(tmp_path / "report-experiments" / "demo.html")
    assert [link for link in page.links if link.startswith("#") and link[1:] not in page.ids] == []
    assert "../report.html" in page.links
    assert sum(link.startswith("data:image/svg+xml;base64,") for link in page.links) == 4
    short = {ref.fingerprint: ref.fingerprint[:12] for ref in (old, new)}
    assert [(row["adapter"], row[""]) for row in page.table("runs")] == [
        (short[new.fingerprint], "champion 2"),
        (short[old.fingerprint], "champion served"),
    ]
    rows = page.table("champions")
    assert [(row["record"], row["adapter"], row["action"], row["gain"], row["by"]) for row in rows] == [
        ("3", short[old.fingerprint], "rolled back current", "", "tests"),
        ("2", short[new.fingerprint], "promoted", "+0.2200 (lower bound +0.1900)", "run 1"),
        ("1", short[old.fingerprint], "promoted by hand", "", "tests"),
    ]
    rows = page.table("served")
    assert [(row["adapter"], row["action"], row["until (UTC)"] == "now", row["champion"]) for row in rows] == [
        (short[old.fingerprint], "rolled back", True, "record 3"),
        (short[new.fingerprint], "serves", False, "record 2"),
        (short[old.fingerprint], "serves", False, "record 1"),
    ]
    assert rows[0]["name on the servers"] == served.history()[-1].name
    assert rows[0]["verified"] == "no server was asked"
    assert rows[1]["verified"] == "http://one:8000: 0.0003 nats/token on 12 rows (at most 0.005) two: not measured"
    assert rows[1]["servers"] == f"http://one:8000 {STRANGE}"
    modes = [row for row in page.table("modes") if row["model"] == "challenger"]
    assert [(row["mode"], row["rows"], row["held-out loss"], row["golden citations"]) for row in modes[:2]] == [
        ("closed_book", "60", "2.5000", ""),
        ("retrieved", "50", "1.2500", "75.0%"),
    ]
    assert len(modes) == 4, "of all rows, and of those with unseen passages"
    assert page.table("preferences") == [
        {"model": "base", "preference accuracy": "50.0%", "reward margin": "+0.000", "words per answer": "30.0"},
        {"model": "challenger", "preference accuracy": "81.0%", "reward margin": "+0.400", "words per answer": ""},
    ]
    lineage = {row["made from"]: row for row in page.table("lineage")[:3]}
    assert lineage["evaluation"]["adapter"] == ""
    assert f"https://huggingface.co/owner/base/tree/{'c' * 40}" in page.links
    assert evaluation.fingerprint in page.text
    stored = (tmp_path / "report.json").read_text()
    assert "tokens" not in json.loads(stored)["experiments"][0]["served"]["records"][0]["probe"], "a row of the user's"


def test_experiments_of_any_name_have_pages_of_their_own_inside_the_folder(
    project: TestProject, tmp_path: Path
) -> None:
    """Anybody with access to the store may name the experiment of an adapter."""
    names = [
        "../../x",
        "/etc/x",
        STRANGE,
        "Demo",
        "DEMO",
        "x" * 300,
        "..",
        ".",
        "5",
        "a-0123456789ab",
        "ä",
        "Ä",
        "con\\x",
        "\u202ereversed",
    ]
    for number, name in enumerate(names):
        made = tmp_path / "made"
        made.mkdir(exist_ok=True)
        (made / "provenance.json").write_text("{}")
        fingerprint = f"{number:064x}"
        project.store.publish(made, ADAPTERS.folder, fingerprint, fingerprint, {"experiment": name})
    report = collect(project.store, project.configs)
    write(report, tmp_path / "pages", project.store.cache.derived)
    files = [path for path in (tmp_path / "pages").rglob("*") if path.is_file()]
    pages = [path for path in files if path.parent.name == "report-experiments"]
    assert len(files) == len(pages) + 3
    assert len({path.name.lower() for path in pages}) == len(report.experiments) >= len(names)
    assert {name for path in pages for name in read(path).text} >= {*map(plain, names)}
    overview = read(tmp_path / "pages" / "report.html")
    assert all((tmp_path / "pages" / unquote(link)).is_file() for link in overview.links)


def test_nothing_trained_yet(project: TestProject, tmp_path: Path) -> None:
    report = collect(project.store, project.configs)
    assert report.trained == []
    write(report, tmp_path, project.store.cache.derived)
    assert "No experiment has a run yet." in " ".join(read(tmp_path / "report.html").text)
    assert (tmp_path / "report.md").read_text() == "No experiment has a run yet."
    assert "No run yet." in " ".join(read(tmp_path / "report-experiments" / "demo.html").text)


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
    drawn = project.store.cache.derived
    write(report, tmp_path / "pages", drawn)
    assert {f"e{number}" for number in range(count)} <= {*read(tmp_path / "pages" / "report.html").text}
    pages = [*(tmp_path / "pages" / "report-experiments").iterdir()]
    assert len(pages) == len(report.experiments)
    assert max(path.stat().st_size for path in (*pages, tmp_path / "pages" / "report.md")) < 150_000

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
    Page(overview(damaged, Path("report.html"), drawn))
