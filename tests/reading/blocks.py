"""Fenced blocks of the documentation, and the invisible comments above them that say what a test does with each.

    <!-- begins: demo s3 -->       once a page: what its project has when the page begins (see tests/docs/conftest.py)
    <!-- run -->                   run the block; with `<!-- run: exit=1 -->` it must end so
    <!-- output -->                each line of the block is in what the last run printed; `...` matches anything
    <!-- not run: reason -->       nothing
    <!-- accepted -->              also becomes, refused: a row of a page about formats (tests/docs/test_formats.py)

A YAML block whose first line is `# configs/...` needs no comment: it is written to that file. So is, on a page that
begins with `code`, a Python block whose first line is `# finetune_assets/...`; and a diff is applied.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

FIRST_RUN = ROOT / "docs" / "index.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = r"(?:^<!-- (?P<mark>[^\n]*) -->\n+)?"
FENCE = re.compile(MARK + r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
BEGINS = re.compile(r"^<!-- begins: (.*) -->$", re.MULTILINE)
MUST_BE_MARKED = ("sh", "python", "yaml")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        where: Page and line.
        language: Of the fence; may be empty.
        text: What stands in it.
        mark: The word of its comment: `run`, `output`, `not run`, or empty.
        option: What follows the word.
    """

    where: str
    language: str
    text: str
    mark: str
    option: str

    @property
    def file(self) -> str | None:
        """The file that the block is."""
        names = {"yaml": r"# (configs/\S+\.yaml)\n", "python": r"# (finetune_assets/\S+\.py)\n"}
        found = re.match(names.get(self.language, "$^"), self.text)
        return found[1] if found else None

    @property
    def exit_code(self) -> int:
        return int(self.option.removeprefix("exit=") or 0)


def blocks(page: Path) -> Iterator[Block]:
    """The page's blocks in order."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        mark, _, option = (found["mark"] or "").partition(":")
        line = text.count("\n", 0, found.start("text"))
        yield Block(f"{page.relative_to(ROOT)}:{line}", found["language"], found["text"], mark, option.strip())


def begins_with(page: Path) -> set[str]:
    """What the page's project has when the page begins."""
    found = BEGINS.search(page.read_text(encoding="utf-8"))
    return set(found[1].split()) if found else set()
