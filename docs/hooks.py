"""What MkDocs needs beside `mkdocs.yml`: pages from outside of `docs/`, and `llms.txt`."""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
ADDED = {
    "results.md": BENCHMARKS / "RESULTS.md",
    **{image.name: image for image in BENCHMARKS.glob("*.svg")},
    "changelog.md": ROOT / "CHANGELOG.md",
}
_navigation: list[Navigation] = []


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages from outside of `docs/`."""
    for address, path in ADDED.items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links that are right on GitHub lead to the added page."""
    return markdown.replace("](../benchmarks/RESULTS.md", "](results.md").replace("](docs/", "](")


def on_nav(nav: Navigation, **_: object) -> None:
    _navigation[:] = [nav]


def on_post_build(config: MkDocsConfig) -> None:
    """Write `llms.txt`: every page with its first sentence, in the order of the menu (https://llmstxt.org)."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    lines += listed(_navigation[0].items, "Pages")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def listed(items: list, heading: str) -> Iterator[str]:  # type: ignore[type-arg]
    """The pages of a part of the menu, then its sections."""
    pages = [item for item in items if item.is_page]
    if pages:
        yield from (f"## {heading}", "")
        yield from (f"- [{page.title}]({page.url}): {first_sentence(page.markdown or '')}" for page in pages)
        yield ""
    for section in items:
        if not section.is_page:
            yield from listed(section.children, section.title)


def first_sentence(markdown: str) -> str:
    """The first sentence of a page's text, without links and marks."""
    for paragraph in re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL).split("\n\n"):
        if re.match(r"\s*(?!```)[A-Z`*\[]", paragraph) and not paragraph.startswith("Generated "):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
            return re.split(r"(?<=\.)\s", text, maxsplit=1)[0].removesuffix(":")
    return ""
