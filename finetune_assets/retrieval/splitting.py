"""Splits documents into passages: by paragraph, by words, or not at all."""

import re
from collections.abc import Iterator

from finetune_assets.config.documents_schema import PassageSettings
from finetune_assets.retrieval.documents import Document
from finetune_assets.retrieval.words import windows

HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|$)", re.DOTALL)
FRONT_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
MOST_FRONT_MATTER = 10_000
"""Maximum length of the settings at the beginning of a Markdown document, in characters."""


def split_text(text: str, settings: PassageSettings) -> list[str]:
    """The passages of a text; none if it is blank."""
    return [passage for passage, _ in split_document(Document(text, ""), settings)]


def split_document(document: Document, settings: PassageSettings, title: str = "") -> Iterator[tuple[str, str]]:
    """The passages of a document, each with its title.

    Args:
        document: The document, or a part of it.
        settings: How documents are split.
        title: Title that the part before it ended with.
    """
    title = document.title or title
    for heading, section in (
        _sections(document.text, title, settings) if document.markdown else [(title, document.text)]
    ):
        for text in _paragraphs(section, document.markdown) if settings.by == "paragraph" else [section]:
            passages = [text.strip()] if settings.by == "document" else windows(text, settings.size, settings.overlap)
            yield from ((passage, heading) for passage in passages if passage)


def last_title(document: Document, title: str) -> str:
    """Title that a part of a document ends with, for the part that follows."""
    return [*_sections(document.text, title, PassageSettings())][-1][0] if document.markdown else title


def _sections(text: str, title: str, settings: PassageSettings) -> Iterator[tuple[str, str]]:
    """Headings of a Markdown text, each with the text below it; one with the whole text if that is one passage."""
    if front := FRONT_MATTER.match(text, endpos=MOST_FRONT_MATTER):
        named = FRONT_TITLE.search(front[1] or "")
        title, text = named[1].strip("'\"") if named else title, text[front.end() :]
    lines: list[str] = []
    for line, is_code in _lines(text):
        heading = None if is_code else HEADING.fullmatch(line.rstrip("\r\n"))
        if heading and settings.by == "document":
            title = title or heading[1] or ""
        elif heading:
            yield title, "".join(lines)
            title, lines = heading[1] or "", []
            continue
        lines.append(line)
    yield title, "".join(lines)


def _paragraphs(text: str, markdown: bool) -> Iterator[str]:
    """Paragraphs of a text, which blank lines separate, but for those in a block of code of Markdown."""
    paragraph: list[str] = []
    for line, is_code in _lines(text) if markdown else ((line, False) for line in text.splitlines(keepends=True)):
        if line.strip() or is_code:
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    yield "".join(paragraph)


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Lines of a Markdown text, and whether each is in a block of code; its fences are."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        yield line, bool(fence or mark)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip(f" \t\r\n{fence[0]}"):
            fence = ""
