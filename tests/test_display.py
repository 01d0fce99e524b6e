"""Texts and URLs from elsewhere reach no terminal, log, error or Markdown as they are."""

import io
import logging
from datetime import UTC, datetime

import pytest
from rich.console import Console

from finetune_assets.artifacts.champions import Record
from finetune_assets.assets.champion_adapter import table
from finetune_assets.cli import terminal
from finetune_assets.cli.terminal import PlainConsole, new_table, styled
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow, DataError
from finetune_assets.data.layouts import row_reader
from finetune_assets.data.tables import conversations_table, rows_table
from finetune_assets.display import (
    PlainRecords,
    code,
    has_credentials,
    markdown,
    message,
    plain,
    shown_url,
    without_credentials,
)
from finetune_assets.errors import UserError

ESCAPE, TITLE, REVERSED, C1, BLANK = "\x1b[2J", "\x1b]0;title\x07", "\u202egpj.exe", "\x9b31m", "\u200b"
RAW = (ESCAPE, "\x1b", "\x07", "\u202e", "\x9b", "\u200b", "\x00")
HOSTILE = f"{ESCAPE}{TITLE}{REVERSED}{C1}{BLANK}\x00[/red][link=http://evil]x[/link] :smile: ünï 日本 a\u200db"
MARKUP = "<script>x</script> ![p](http://evil/p) [l](http://evil) | `c` **b** ~~s~~ &lt;"


def test_hidden_characters_are_shown_and_letters_are_kept() -> None:
    shown = plain(HOSTILE)
    assert not [raw for raw in RAW if raw in shown]
    assert "\\x1b[2J" in shown
    assert "\\u202egpj.exe" in shown
    assert shown.endswith("ünï 日本 a\u200db")
    assert plain("a\nb\tc") == "a\\nb\\tc"
    assert plain("a\nb\tc\r", lines=True) == "a\nb\tc\\r"


@pytest.mark.parametrize("raw", ["<script", "![p](", "[l](", " | ", "`c`", "**b**", "~~s~~"])
def test_markdown_and_html_are_shown_as_written(raw: str) -> None:
    assert raw not in markdown(MARKUP)


@pytest.mark.parametrize("text", ["# a", "- a", "> a", "1. a", "+ a", "=== a"])
def test_a_text_begins_no_block_of_markdown(text: str) -> None:
    assert markdown(text)[:2] != text[:2]


def test_code_cannot_be_ended() -> None:
    assert code("a`b|c\n\x1b") == "`a'b\\|c\\n\\x1b`"


def hostile_outputs() -> dict[str, str]:
    """What is shown of a row, a file, a setting and a champion's reason."""
    row = {"instruction": HOSTILE + MARKUP, "context": "", "response": "r", "category": HOSTILE}
    turns = [{"role": "user", "content": HOSTILE + MARKUP, "name": HOSTILE}, {"role": "assistant", "content": "x"}]
    record = Record("demo", "f" * 64, "promoted", reason=HOSTILE + MARKUP, by="me", number=1, at="2026-01-01")
    return {
        "rows": rows_table([row], ["instruction", "category"]),
        "conversations": conversations_table([{"category": HOSTILE, "messages": turns}]),
        "champion": table([record]),
    }


@pytest.mark.parametrize("output", ["rows", "conversations", "champion"])
def test_metadata_shows_nothing_raw(output: str) -> None:
    shown = hostile_outputs()[output]
    assert not [
        raw
        for raw in (*RAW, "<script", "](http", "`c`")
        if raw in shown.replace("&#91;l](http", "").replace("&#91;p](http", "")
    ]


@pytest.mark.parametrize("error", [UserError, DataError, BadRow])
def test_errors_show_nothing_raw(error: type[Exception]) -> None:
    assert not [raw for raw in RAW if raw in str(error(HOSTILE))]
    assert "PASS" not in str(error("cannot read s3://key:PASS@bucket/x?sig=PASS now"))


def test_errors_of_settings_are_one_line() -> None:
    assert "\n" not in str(ConfigError(f"a\n{ESCAPE}.yaml", "key\x1b", "value\n\u202e"))
    assert "\x1b" not in str(ConfigError(f"a{ESCAPE}.yaml", "key\x1b", "value"))


@pytest.mark.parametrize(
    "row", [{f"instructio{ESCAPE}": "x", "response": "y"}, {"instruction": [HOSTILE], "response": "y"}, {HOSTILE: 1}]
)
def test_reasons_of_rows_show_nothing_raw(row: dict[str, object]) -> None:
    with pytest.raises(BadRow) as refused:
        row_reader(Columns())(row)
    assert not [raw for raw in RAW if raw in str(refused.value)]


def test_the_terminal_shows_markup_and_escapes_as_text() -> None:
    printed = io.StringIO()
    console = PlainConsole(file=printed, highlight=False, soft_wrap=True, width=500, force_terminal=True)
    cells = new_table("name", "other")
    cells.add_row(HOSTILE, "[/red]")
    for output in (HOSTILE, styled(HOSTILE, "red"), cells, "http://u:PASS@h/x"):
        console.print(output)
    text = printed.getvalue()
    assert ESCAPE not in text
    assert not [raw for raw in ("\x07", "\u202e", "\x9b", "\u200b", "PASS") if raw in text]
    assert text.count("[/red][link=http://evil]x[/link] :smile: ünï 日本") == 3
    assert isinstance(terminal.out, PlainConsole)
    assert isinstance(terminal.out, Console)


def test_log_records_show_nothing_raw() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(PlainRecords())
    logger = logging.getLogger("tests.display")
    logger.addHandler(handler)
    logger.propagate = False
    logger.warning("file %s\nforged line, from %s", f"a{HOSTILE}", "https://u:PASS@host/x?token=PASS")
    assert written.getvalue().count("\n") == 1
    assert not [raw for raw in (*RAW, "PASS") if raw in written.getvalue()]


URLS = {
    "s3://key:PASS@bucket/x": "s3://bucket/x",
    "s3://PASS@bucket": "s3://bucket",
    "s3://k:P%40PASS@bucket": "s3://bucket",
    "S3://k:PASS@bucket": "S3://bucket",
    "s3://b/p?secret=PASS": "s3://b/p",
    "hf://datasets/u:PASS@owner/name@main": "hf://datasets/owner/name@main",
    "hf://u:PASS@datasets/owner/name": "hf://datasets/owner/name",
    "HTTPS://U:PASS@host:8080/p?sig=PASS#PASS": "HTTPS://host:8080/p",
    "http://u:p/PASS@host/x": "http://host/x",
    "http://u:p?PASS@host/x": "http://host/x",
    "http://u:p#PASS@host/x": "http://host/x",
    "http://u:pa'PASS@host/x": "http://host/x",
    "https://b.s3.amazonaws.com/k?X-Amz-Signature=PASS&X-Amz-Date=1": "https://b.s3.amazonaws.com/k",
    "https://storage.googleapis.com/b/o?X-Goog-Signature=PASS": "https://storage.googleapis.com/b/o",
    "https://a.blob.core.windows.net/c/b?sv=1&sig=PASS": "https://a.blob.core.windows.net/c/b",
    "postgresql+psycopg2://a:PASS@db:5432/x?password=PASS": "postgresql+psycopg2://db:5432/x",
    "smtp://u:PASS@mail:587": "smtp://mail:587",
    "https://hooks.slack.com/services/T0/B0/PASS": "https://hooks.slack.com/services/(hidden)",
    "https://discord.com/api/webhooks/1/PASS": "https://discord.com/api/webhooks/(hidden)",
    "https://host/hf_PASSPASSPASSPASSPASS/x": "https://host/(hidden)/x",
    "s3://bucket/jane@example.com/rows": "s3://bucket/jane@example.com/rows",
    "hf://datasets/owner/name@v1.0": "hf://datasets/owner/name@v1.0",
    "http://[::1]:9000/x": "http://[::1]:9000/x",
    "file:///data/a@b:c?d": "file:///data/a@b:c?d",
    "./rows.jsonl": "./rows.jsonl",
}


@pytest.mark.parametrize("url", URLS)
def test_urls_are_shown_without_credentials(url: str) -> None:
    assert shown_url(url) == URLS[url]
    assert URLS[url] in without_credentials(f"cannot read '{url}': again ({url}), {url}.")
    assert "PASS" not in message(f"cannot read '{url}': again ({url}), {url}.")


@pytest.mark.parametrize(
    "text",
    [
        "HTTPConnectionPool(host='h', port=80): Max retries exceeded with url: /api?token=PASS (Caused by x)",
        "/project/https:/u:PASS@host/x: does not exist",
        'Could not connect to the endpoint URL: "http://u:PASS@host/bucket?list-type=2&sig=PASS"',
        "proxy //u:PASS@host:3128",
    ],
)
def test_errors_of_libraries_are_shown_without_credentials(text: str) -> None:
    assert "PASS" not in without_credentials(text)


def test_other_texts_stay_as_they_are() -> None:
    for text in ("at 3/4 of the rows? yes=1", "a@b.org wrote http://x.org/a, then ./b", f"{datetime.now(UTC)}"):
        assert without_credentials(text) == text
    assert not has_credentials("s3://bucket/prefix")
    assert has_credentials("s3://key@bucket/prefix")
