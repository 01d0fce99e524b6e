"""What MkDocs is told beside `mkdocs.yml`: measurements are a page too, though they lie with the benchmarks."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ADDED = {"results.md": BENCHMARKS / "RESULTS.md", "train-cpu.svg": BENCHMARKS / "train-cpu.svg"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside of `docs/`."""
    for address, path in ADDED.items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links that are right on GitHub lead to the added page."""
    return markdown.replace("](../benchmarks/RESULTS.md", "](results.md")
