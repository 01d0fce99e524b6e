"""Finds secrets and personal data in texts, and hides them where rows are shown.

A kind of your own is an entry in TOKENS, KEYS or PERSONAL.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finetune_assets.data.rows import Row
from finetune_assets.data.sensitive.keys import KEYS
from finetune_assets.data.sensitive.kind import HIDDEN, START, Finding, Kind
from finetune_assets.data.sensitive.personal import PERSONAL
from finetune_assets.data.sensitive.tokens import TOKENS, is_from_documentation, is_random

KINDS: tuple[Kind, ...] = (*TOKENS, *KEYS, *PERSONAL)
"""Of two findings in one place the earlier kind is listed."""
SHOWN_PER_KIND = 5
"""Maximum number of findings to list for each kind."""

SIEVE = "|".join(sorted({kind.sieve or "|".join(map(re.escape, kind.hints)) for kind in KINDS}))
"""Matches every text in which a kind may find something; RE2 searches for all of it in one pass."""
_CUT = re.compile(
    START + r"(?:AKIA|ASIA|gh[opsur]_|github_pat_|glpat-|xox[a-z]-|[rs]k_live_|sk-(?:ant-|proj-|or-)?|hf_|AIza|npm_|"
    r"pypi-Ag|SG\.|eyJ|GOCSPX-|ya29\.|do[opr]_v1_|shp(?:at|ca|pa|ss)_|dapi|dckr_|hv[bs]\.|glsa_|lin_api_|ntn_|NRAK-|PMAK-|"
    r"gsk_|xai-|r8_|AGE-SECRET-KEY-1)[A-Za-z0-9_.-]{6,}\Z"
)
"""A key that was cut off at the end of a text."""


@dataclass
class Sensitive:
    """Secrets and personal data in the good rows.

    Attributes:
        rows: Number of rows with any.
        findings: Number of findings by kind.
        examples: Number of placeholders, which are no findings: addresses at example.com, keys of documentation.
        first: The first findings of each kind: row (from 0), field or turn, and the span as it is shown.
    """

    rows: int = 0
    findings: dict[str, int] = field(default_factory=dict)
    examples: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)


class ScannedRows(NamedTuple):
    """What a batch of rows contains.

    Attributes:
        rows: Number of rows.
        findings: Each finding, with the index of its row and its field or turn.
    """

    rows: int
    findings: list[tuple[int, str, Finding]]


def scan_rows(rows: Sequence[Row]) -> ScannedRows:
    """Scan rows; thousands at once, because a sieve in compiled code passes over most of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = pa.array(map(_joined, rows), pa.string())
    return ScannedRows(
        len(rows),
        [
            (index, where, finding)
            for index in pc.indices_nonzero(pc.match_substring_regex(texts, SIEVE)).to_pylist()
            for where, text in _texts(rows[index])
            for finding in find(text)
        ],
    )


class SensitiveScan:
    """Accumulates the `Sensitive` of scanned rows, in their order."""

    def __init__(self) -> None:
        self._seen = 0
        self._rows: set[int] = set()
        self._findings: Counter[str] = Counter()
        self._sensitive = Sensitive()

    def add(self, scanned: ScannedRows) -> None:
        for index, where, finding in scanned.findings:
            self._count(finding, self._seen + index, where)
        self._seen += scanned.rows

    def _count(self, finding: Finding, row: int, where: str) -> None:
        if finding.is_example:
            self._sensitive.examples += 1
            return
        self._rows.add(row)
        self._findings[finding.kind] += 1
        if self._findings[finding.kind] <= SHOWN_PER_KIND:
            shown = {"kind": finding.kind, "row": row, "field": where, "shown": finding.shown}
            self._sensitive.first.append(shown)

    def sum_up(self) -> Sensitive:
        self._sensitive.rows = len(self._rows)
        self._sensitive.findings = dict(self._findings.most_common())
        return self._sensitive


def _joined(row: Row) -> str:
    if row["messages"]:
        return "\n".join(text for _, text in _texts(row))
    texts = row["instruction"], row["context"], row["response"], row["category"], row.get("rejected") or ""
    return "\n".join(texts)


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    """The texts of a row by field or turn. Of a conversation the fields repeat its turns, and are left out."""
    turns = row["messages"]
    for name, value in row.items():
        repeated = turns and name in ("instruction", "context", "response", "rejected")
        if value and isinstance(value, str) and not repeated:
            yield name, value
    for where, side in (("", turns), ("rejected, ", row.get("rejected_messages"))):
        for number, turn in enumerate(side or (), 1):
            for name, value in turn.items():
                if value and name != "role":
                    yield f"{where}turn {number}" + ("" if name == "content" else f", {name}"), _as_text(value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def find(text: str) -> list[Finding]:
    """Secrets and personal data in a text, in order; of those that overlap, the kind that comes first in KINDS."""
    findings: list[Finding] = []
    for finding in _all(text):
        if not any(finding.start < other.end and other.start < finding.end for other in findings):
            findings.append(finding)
    return sorted(findings, key=lambda finding: finding.start)


def _all(text: str) -> list[Finding]:
    return [finding for kind in KINDS for finding in kind.find(text)]


def masked(text: str) -> str:
    """A text as it is shown: with secrets and personal data hidden. Examples are left."""
    pieces, end = [], 0
    for finding in sorted((finding for finding in _all(text) if not finding.is_example), key=lambda each: each.start):
        if finding.start >= end:
            pieces += [text[end : finding.start], finding.shown]
        end = max(end, finding.end)
    return _CUT.sub(_hide_cut, "".join([*pieces, text[end:]]))


def _masked_json(text: str) -> str | None:
    if not text.startswith(("[", "{")):
        return None
    try:
        return json.dumps(masked_values(json.loads(text)), ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _hide_cut(match: re.Match[str]) -> str:
    return HIDDEN if is_random(match[0]) and not is_from_documentation(match[0]) else match[0]


def _free(name: Any, taken: dict[Any, Any]) -> str:
    """A name for a second value whose own name is hidden in the same way as that of the first."""
    return next(f"{name} {number}" for number in itertools.count(2) if f"{name} {number}" not in taken)


def masked_values(value: Any) -> Any:
    """Lists and dictionaries of texts as they are shown, such as rows. A text of JSON, as of tool calls, stays JSON."""
    if isinstance(value, str):
        shown_text = masked(value)
        return shown_text if shown_text == value else _masked_json(value) or shown_text
    if isinstance(value, dict):
        shown: dict[Any, Any] = {}
        for name, part in value.items():
            name, part = masked_values(name), masked_values(part)
            if name in shown and type(shown[name]) is type(part) is int:  # counts of hidden names
                part += shown[name]
            shown[_free(name, shown) if name in shown and type(part) is not int else name] = part
        return shown
    return [masked_values(part) for part in value] if isinstance(value, list) else value
