"""Every example of the pages about formats is read, and is accepted or refused as the page states.

<!-- accepted -->                     the rows of the block are good; with `<!-- accepted: {...} -->`, under
                                      these `columns`
<!-- becomes -->                      the row that was last accepted has these values
<!-- refused: part of the reason -->  a row, or the file, is refused for this reason
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from reading.blocks import Block, blocks

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow, DataError
from finetune_assets.data.layouts import row_reader
from finetune_assets.data.readers import Unreadable, read_records
from finetune_assets.data.rows import Row

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("formats", "conversations", "judgements")]
EXAMPLES = [block for page in PAGES for block in blocks(page) if block.mark != "becomes"]
RESULTS = {before.where: after for page in PAGES for before, after in pairwise(blocks(page))}


def written(block: Block, folder: Path) -> Path:
    """The file that a block shows. A JSON block is one row, which takes one line in the file."""
    file = folder / f"rows.{'jsonl' if block.language == 'json' else block.language}"
    is_row = block.language == "json"
    file.write_text(json.dumps(json.loads(block.text)) + "\n" if is_row else block.text, encoding="utf-8")
    return file


def read(block: Block, folder: Path) -> tuple[list[Row], list[str]]:
    """The good rows of a block, and the reasons of the bad ones."""
    columns = Columns(**json.loads(block.option)) if block.mark == "accepted" and block.option else Columns()
    reader, rows, reasons = row_reader(columns), list[Row](), list[str]()
    try:
        for record in read_records(written(block, folder)):
            if isinstance(record, Unreadable):
                reasons.append(record.reason)
                continue
            try:
                rows.append(reader(record.row))
            except BadRow as e:
                reasons.append(str(e))
    except DataError as e:
        reasons.append(str(e))
    return rows, reasons


def plain(value: Any) -> Any:
    """A value without the keys of turns that have none."""
    if isinstance(value, list):
        return [{name: part for name, part in turn.items() if part is not None} for turn in value]
    return value


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: block.where)
def test_an_example(block: Block, tmp_path: Path) -> None:
    assert block.mark in ("accepted", "refused"), f"{block.where}: write `<!-- accepted -->` above the block"
    rows, reasons = read(block, tmp_path)
    if block.mark == "refused":
        assert block.option
        assert any(block.option in reason for reason in reasons), reasons
        return
    assert (len(rows) > 0, reasons) == (True, [])
    after = RESULTS.get(block.where)
    if after and after.mark == "becomes":
        expected = json.loads(after.text)
        assert {name: plain(rows[-1].get(name)) for name in expected} == expected


def test_every_section_has_accepted_and_refused_rows() -> None:
    assert sum(block.mark == "accepted" for block in EXAMPLES) >= 20
    assert sum(block.mark == "refused" for block in EXAMPLES) >= 20
