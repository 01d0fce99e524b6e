"""CSV and TSV: quotes are quotes, and after broken ones no line becomes a row that nobody wrote."""

import csv
import io
import json
import random
from pathlib import Path

import pytest
from raw import quarantined, rows_of

from finetune_assets.data.errors import DataError
from finetune_assets.data.readers import SourceRecord, read_records

HEADER = "instruction,response\n"


def parsed(path: Path, text: str) -> tuple[list[list[str]], list[int]]:
    """The fields of the good rows, and the lines of the bad ones."""
    path.write_text(text, encoding="utf-8", newline="")
    records = list(read_records(path))
    good = [[*record.row.values()] for record in records if isinstance(record, SourceRecord)]
    return good, [record.line for record in records if not isinstance(record, SourceRecord)]


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('"Who?", "Four."', ["Who?", "Four."]),
        ('  "Who?",   "a, b"', ["Who?", "a, b"]),
        (" a, b", [" a", " b"]),
        ('"a, ""b"", c", "d"', ['a, "b", c', "d"]),
        ('"two\n, ""x"" lines", "y"', ['two\n, "x" lines', "y"]),
        ('"x", ', ["x", " "]),
        ('"x",""', ["x", ""]),
        ('5" disk, b', ['5" disk', " b"]),
        ('say "a" , b', ['say "a" ', " b"]),
    ],
)
def test_blanks_before_a_quote_are_no_part_of_the_field(tmp_path: Path, line: str, fields: list[str]) -> None:
    assert parsed(tmp_path / "a.csv", f"{HEADER}{line}\r\nc,d\r\n") == ([fields, ["c", "d"]], [])


def test_blanks_in_the_header_and_in_tsv(tmp_path: Path) -> None:
    assert parsed(tmp_path / "a.tsv", 'a\tb\n"x, y"\t "z\t"\n p\tq\n') == ([["x, y", "z\t"], [" p", "q"]], [])
    (tmp_path / "b.csv").write_text('"instruction", "response"\na,b\n')
    assert rows_of(tmp_path / "b.csv", out=tmp_path / "out")[0]["response"] == "b"


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('"Say "a,\nb" please",x\nc,d\n', [["c", "d"]], [2, 3]),
        ('"5" disk",x\nc,d\n', [["c", "d"]], [2]),
        ('"He said "hi",\nthen left, and\nended",x\nc,d\n"e",f\n', [["c", "d"], ["e", "f"]], [2, 3, 4]),
        ('"He said "hi",\n",x\nc,d\n"e",f\n', [["c", "d"], ["e", "f"]], [2, 3]),
        ('"a", b, c\nd",x\ne,f\n', [["e", "f"]], [2, 3]),
        ('c,"d\ne,f\n"g, h",i\nj,k\n', [["j", "k"]], [2, 3, 4]),
        ('"Say "a,b\nc,d\ne,f\n', [["c", "d"], ["e", "f"]], [2]),
        ("question one\n\nstill it,answer\nc,d\n", [["c", "d"]], [2, 4]),
        ("x,y,z\nc,d\n", [["c", "d"]], [2]),
        ("a,b\n\ufeffinstruction,response\nc,d\n", [["a", "b"], ["c", "d"]], [3]),
    ],
)
def test_lines_that_may_belong_to_a_bad_row_are_set_aside(
    tmp_path: Path, text: str, good: list[list[str]], bad: list[int]
) -> None:
    assert parsed(tmp_path / "a.csv", HEADER + text) == (good, bad)


def table(rows: list[list[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def test_one_broken_row_costs_itself_alone(tmp_path: Path) -> None:
    """300 good rows, a row with unescaped quotes and a line break among them, and both halves set aside."""
    rows = [[f"question {i}", f'answer, "{i}"' if i % 3 else f"answer {i}"] for i in range(300)]
    for at in (0, 1, 150, 299, 300):
        text = HEADER + table(rows[:at]) + '"Say "a,\nb" please",x\n' + table(rows[at:])
        good, bad = parsed(tmp_path / "a.csv", text)
        assert good == rows
        assert bad == [at + 2, at + 3]


WORDS = [
    "He said",
    '"hi"',
    "then, left",
    "\n",
    '"yes, no"',
    ",",
    "and",
    '"',
    'x"',
    '\n"Well',
    ", ",
    "\n\n",
    '""',
    "a,b",
]


def test_no_line_after_broken_quotes_becomes_a_row_that_nobody_wrote(tmp_path: Path) -> None:
    """Texts of quotes, commas and line breaks between quotes that are not doubled, in 1,000 files."""
    rng = random.Random(7)
    rows = [[f"question {i}", f'answer, "{i}"' if i % 2 else f"answer {i}"] for i in range(40)]
    written = {*map(tuple, rows)}
    kept = list[int]()
    for _ in range(1_000):
        text = " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))
        broken = f'"{text}",x\n'
        if is_csv(broken):
            continue
        good, bad = parsed(tmp_path / "a.csv", HEADER + table(rows[:20]) + broken + table(rows[20:]))
        assert written >= {*map(tuple, good)}, broken
        assert bad, broken
        kept.append(len(good))
    assert len(kept) > 700
    assert sum(kept) > 0.99 * 40 * len(kept)


def is_csv(text: str) -> bool:
    """Whether a text is one valid row of two fields."""
    try:
        return [len(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True)] == [2]
    except csv.Error:
        return False


def test_set_aside_lines_are_kept_with_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEADER + 'a,b\n"Say "a,\nb" please",x\n')
    assert len(rows_of(tmp_path / "a.csv", out=tmp_path / "out")) == 1
    bad = quarantined(tmp_path / "out")
    assert [(row["line"], row["text"]) for row in bad] == [(3, '"Say "a,\n'), (4, 'b" please",x\n')]
    assert "line 3" in bad[1]["reason"]
    assert json.dumps(bad)


def test_a_line_without_end_is_refused_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEADER + "a,b\n" + "x" * (20 << 20))
    with pytest.raises(DataError, match=r"a\.csv:3: "):
        list(read_records(tmp_path / "a.csv"))


def test_a_quote_that_closes_too_late_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEADER + 'a,b\n"c,d\n' + "some, text\n" * 2_000_000)
    with pytest.raises(DataError, match=r"a\.csv:3: "):
        list(read_records(tmp_path / "a.csv"))
