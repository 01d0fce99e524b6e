"""The documentation as a site: whole, and it asks nobody for anything."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from paths import ROOT
from playwright.sync_api import expect
from reading.blocks import PAGES

from docs import diagrams, layers
from docs.graph import TARGET, draw, parents_of_assets
from docs.reference import PAGES as PAGES_OF_REFERENCE
from docs.screenshots import BROWSER, browser

ELSEWHERE = re.compile(r"(https?:)?//")
MOST_WORDS = 1500
GENERATED = ("settings", *PAGES_OF_REFERENCE)
"""Pages that people look things up in, and do not read."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; with `--strict`, a link or an anchor to nothing, or a page that no menu has, is a failure."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Loaded(HTMLParser):
    """Collects what a browser would load by itself; links that a person follows are not that."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        names = ("src", "srcset", "data", "poster") + (("href",) if tag in ("link", "use", "image") else ())
        self.addresses += [of[name] or "" for name in names if name in of]
        self.classes |= set((of.get("class") or "").split())


@pytest.mark.system
def test_no_page_loads_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert loaded.addresses
        assert [address for address in loaded.addresses if ELSEWHERE.match(address)] == [], page.name
        assert "mermaid" not in loaded.classes, "the theme would load its renderer from a CDN: draw a picture"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


@pytest.mark.system
@pytest.mark.skipif(BROWSER is None, reason="chromium is not installed (Debian: chromium)")
def test_it_reads_and_searches_from_the_disk(site: Path) -> None:
    with browser() as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / "how-it-works.html").as_uri())
        graph = page.locator("img[src$='graph.svg']")
        assert graph.evaluate("image => image.complete && image.naturalWidth > 100")
        page.get_by_placeholder("Search").click()
        page.get_by_placeholder("Search").press_sequentially("quarantine")
        expect(page.locator(".md-search-result__item").first).to_contain_text("quarantine", ignore_case=True)
        # A page whose sections alone hold the word is listed above them, by a link that marks nothing
        page.locator(".md-search-result__link[href*='h=quarantine']").first.click()
        expect(page.locator("article mark").first).to_be_visible()
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere_on_github_too(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in GENERATED], ids=lambda page: page.stem)
def test_a_page_is_short(page: Path) -> None:
    words = re.findall(r"\S*\w\S*", page.read_text(encoding="utf-8"))
    assert len(words) <= MOST_WORDS, "divide the page by kind"


def test_llms_txt_lists_every_page(site: Path) -> None:
    listed = re.findall(r"^- \[.+\]\((.+)\): .+$", (site / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")} - {"404.html"}
    assert set(listed) == pages


def test_the_packages_picture_is_of_the_contract(tmp_path: Path) -> None:
    layers.draw(tmp_path / "layers.svg")
    assert (tmp_path / "layers.svg").read_bytes() == layers.TARGET.read_bytes(), "run `make docs`"


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_a_diagram_is_as_drawn(name: str, tmp_path: Path) -> None:
    diagrams.draw(diagrams.DIAGRAMS[name], tmp_path / "diagram.svg")
    assert (tmp_path / "diagram.svg").read_bytes() == (diagrams.IMAGES / f"{name}.svg").read_bytes(), "run `make docs`"


def test_the_graphs_picture_is_of_the_graph(tmp_path: Path) -> None:
    draw(parents_of_assets(), tmp_path / "graph.svg")
    assert (tmp_path / "graph.svg").read_bytes() == TARGET.read_bytes(), "run `make docs`"
