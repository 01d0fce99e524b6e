"""The registry of row layouts. A layout of your own is a file in this folder and an entry in LAYOUTS.

No content is dropped silently: a row with a key that resembles a known one, with two values of one meaning, or with a
turn that contains more than text, is a bad row; columns that no layout reads are counted.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow
from finetune_assets.data.layouts.conversation import CONVERSATION, ignored_turn_keys
from finetune_assets.data.layouts.instruction import INSTRUCTION
from finetune_assets.data.layouts.joining import join_turns
from finetune_assets.data.layouts.layout import Layout
from finetune_assets.data.layouts.other_formats import MARKS, refuse_other_formats
from finetune_assets.data.layouts.preferences import COLUMNS as JUDGEMENT
from finetune_assets.data.layouts.preferences import judged_row
from finetune_assets.data.layouts.turn_keys import WEIGHT_KEYS
from finetune_assets.data.layouts.values import Values, is_empty, shortened
from finetune_assets.data.readers.records import MAX_COLUMNS
from finetune_assets.data.rows import Row

LAYOUTS: tuple[Layout, ...] = (
    CONVERSATION,
    INSTRUCTION,
)
"""Layouts in the order in which they are tried; the last is that of rows without any marker. Raise the code version of
`RAW` in artifacts/kinds.py with each change, so that raw data is read again."""
COMMON = {"category": ("category",), "system": ("system", "system_prompt", "system_message")}
"""Columns of every layout."""
JOINED = (CONVERSATION, INSTRUCTION)
"""Layouts that read each other's columns, by `join_turns`."""
LONGEST_NAME = 200
"""Characters of a key up to which it may be a misspelt name; names that the settings choose may be longer."""
NAMED = 1_000
"""Maximum number of columns of a file that are remembered, because keys may be data."""
CACHED_KEYS, COMPARED_KEYS, MOST_COMPARED = 100, 100, 20_000
"""Keys of a row up to which their study is remembered; unknown keys of a row, and of a file, that are compared with the
known ones, which takes a quarter of a millisecond each."""
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
ATTRIBUTES = frozenset(
    "id ids uuid guid key keys idx index hash md5 sha number num no nr count len length size chars tokens time date "
    "timestamp lang language type kind model source url link author user name score rating rank quality version".split()
)
"""Last words of keys that describe a column rather than misspell it, as in `conversation_id`."""


class _Study(NamedTuple):
    """What the keys of a row mean.

    Attributes:
        names: Of each column's accepted names, those among the keys.
        misspelt: Unknown keys, each with the known key that it resembles and the column of that key.
        has_marks: Whether the row may be of another format.
        is_judged: Whether the row may have a judgement.
        weight: Key that may exclude the row from the loss; empty without one.
    """

    names: Mapping[str, tuple[str, ...]]
    misspelt: list[tuple[str, str, str]]
    has_marks: bool
    is_judged: bool
    weight: str


class RowReader:
    """Converts rows of the source to rows of `RAW_SCHEMA`, and counts what it ignores.

    Attributes:
        keys: Keys of the rows.
        ignored: Number of rows with a value in a column that is not read, by column.

    Args:
        columns: Column names of the source.
    """

    def __init__(self, columns: Columns) -> None:
        self.keys: dict[str, None] = {}
        self.ignored: Counter[str] = Counter()
        self._ignore = frozenset(columns.ignore)
        self._given = {name: theirs for name, theirs in asdict(columns).items() if isinstance(theirs, str)}
        known = {name: group for layout in LAYOUTS for name, group in layout.columns.items()}
        known |= COMMON | JUDGEMENT
        taken = {*self._given.values(), *columns.ignore}
        self._names = {
            name: (self._given[name],) if name in self._given else tuple(key for key in group if key not in taken)
            for name, group in known.items()
        }
        self._compared = 0
        self._study = lru_cache(maxsize=1_000)(self._study_keys)
        self._unread = lru_cache(maxsize=1_000)(self._unread_keys)

    def __call__(self, row: Any) -> Row:
        """Convert a row.

        Raises:
            BadRow: with the reason, if the row is invalid.
        """
        try:
            return self._read(row)
        except RecursionError as e:
            raise BadRow("values are nested too deeply; flatten or remove them") from e

    def _read(self, row: Any) -> Row:
        if not isinstance(row, dict):
            raise BadRow(f"expected a JSON object, found {shortened(row)}")
        if len(row) > MAX_COLUMNS:
            raise BadRow(f"{len(row):,} keys; at most {MAX_COLUMNS:,} are supported")
        keys = tuple(row)
        few = len(keys) <= CACHED_KEYS
        study = self._study(keys) if few else self._study_keys(keys)
        if self._ignore:
            row = {key: value for key, value in row.items() if key not in self._ignore}
        for key, meant, column in study.misspelt:
            if row[key] and all(is_empty(row.get(name)) for name in study.names[column]):
                raise BadRow(f"unknown key '{key}' would be lost; did you mean '{meant}'?")
        if study.has_marks:
            refuse_other_formats(row)
        if study.weight and row.get(study.weight) in (0, False) and not isinstance(row[study.weight], str):
            raise BadRow(
                f"'{study.weight}' is {shortened(row[study.weight])}, so the row is not to be learned; remove it, or "
                "list the column in raw_data.yaml: columns.ignore to learn it"
            )
        used: list[tuple[Layout, Values]] = []

        def read(values: Values) -> Row:
            values = join_turns(values)
            system, category = values.text("system"), _category(values)
            layout = next((layout for layout in LAYOUTS if values.pick(layout.marker)), LAYOUTS[-1])
            used.append((layout, values))
            return layout.read(values, category, system)

        values = Values(row, study.names)
        judged = judged_row(values, "label" in self._given, read) if study.is_judged else None
        good = read(values) if judged is None else judged
        layout, values = used[-1]
        judgement = {name for column in JUDGEMENT if column in good for name in study.names[column]}
        judgement |= {*study.names["chosen"]} if "rejected" in good else set()
        for key in (self._unread if few else self._unread_keys)(keys, LAYOUTS.index(layout)):
            if key not in judgement and (key in self._ignore or not is_empty(row[key])):
                self._count_ignored(key)
        if layout is CONVERSATION:
            for key in ignored_turn_keys(values.row, values.names["messages"]):
                self._count_ignored(f"{key} of turns")
        return good

    def _count_ignored(self, name: str) -> None:
        self.ignored[name if name in self.ignored or len(self.ignored) < NAMED else "other columns"] += 1

    def missing(self) -> dict[str, str]:
        """Columns that the settings name and no row has, each with its setting; empty if there was no row."""
        named = {column: f"columns.{setting}" for setting, column in self._given.items()}
        named |= dict.fromkeys(self._ignore, "columns.ignore")
        return {column: setting for column, setting in named.items() if self.keys and column not in self.keys}

    def _study_keys(self, keys: tuple[str, ...]) -> _Study:
        named = {*self._given.values(), *self._ignore}
        self.keys |= dict.fromkeys(keys if len(self.keys) < NAMED else named.intersection(keys))
        known = {name: column for column, group in self._names.items() if column not in JUDGEMENT for name in group}
        judgement = {name for column in JUDGEMENT for name in self._names[column]}
        unknown = [
            key
            for key in keys
            if len(key) <= LONGEST_NAME and not (key in known or key in named | judgement or _is_attribute(key))
        ]
        unknown = unknown[: min(COMPARED_KEYS, MOST_COMPARED - self._compared)]
        self._compared += len(unknown)
        near = ((key, get_close_matches(key, known, 1, 0.75)) for key in unknown)
        names = {
            column: tuple(name for name in group if name in keys) or group[:1] for column, group in self._names.items()
        }
        misspelt = [(key, matches[0], known[matches[0]]) for key, matches in near if matches]
        weight = next((key for key in keys if key in WEIGHT_KEYS and key not in known), "")
        return _Study(names, misspelt, not MARKS.isdisjoint(keys), not judgement.isdisjoint(keys), weight)

    def _unread_keys(self, keys: tuple[str, ...], number: int) -> list[str]:
        """The keys that a layout does not read."""
        layout = LAYOUTS[number]
        layouts = JOINED if layout in JOINED else (layout,)
        columns = [*COMMON, *(column for each in layouts for column in each.columns)]
        read = {name for column in columns for name in self._names[column]}
        return [key for key in keys if key not in read]


def row_reader(columns: Columns) -> RowReader:
    """Create the reader of the rows of one file; see `RowReader`."""
    return RowReader(columns)


def _is_attribute(key: str) -> bool:
    words = WORD.findall(key)
    return len(words) > 1 and words[-1].lower() in ATTRIBUTES


def _category(values: Values) -> str:
    """Category of a row; pandas writes a missing one as `nan`."""
    category = values.text("category", numbers=True)
    return "" if category.lower() == "nan" else category
