"""The quotes of CSV and TSV, line by line."""

import re


class Quotes:
    """Rules of quotes in a table.

    Args:
        delimiter: Character between the fields of a row.
    """

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter
        quoted, plain = r'"(?>[^"]++|"")*+"', rf'[^"{delimiter}\r\n]*+'
        self._after_delimiter = f"{delimiter} "
        self._clean = re.compile(rf"(?:(?: *+{quoted}|{plain})(?:{delimiter}|\r?\n?\Z))++")
        self._field = re.compile(rf" *(?=\")|[^{delimiter}]*{delimiter}?")
        self._rest = re.compile(rf'(?>[^"]++|"")*+"?[^{delimiter}]*{delimiter}?')
        self._opening = re.compile(rf'(?:\A|{delimiter}) *"')
        self._closing = re.compile(rf'"(?={delimiter}|\Z)')

    def without_blanks(self, line: str, is_first: bool) -> str:
        """Remove blanks between a delimiter and an opening quote, as in `"a", "b"`: `csv` takes such a quote as text.

        Args:
            line: A line of a row.
            is_first: Whether it is the first line of its row; any other begins inside a quoted field.
        """
        if not (line[0] == " " or self._after_delimiter in line):
            return line
        parts, position, is_open = [], 0, not is_first
        while position < len(line):
            if is_open:
                end = self._rest.match(line, position).end()  # type: ignore[union-attr]
                parts.append(line[position:end])
                is_open = False
            else:
                end = self._field.match(line, position).end()  # type: ignore[union-attr]
                is_open = line.startswith('"', end) and not line[position:end].strip(" ")
                parts.append('"' if is_open else line[position:end])
                end += is_open
            position = end
        return "".join(parts)

    def are_clean(self, row: str) -> bool:
        """Whether every quote in a row encloses a field, or is doubled inside of one."""
        return self._clean.fullmatch(row) is not None

    def open_first(self, line: str) -> bool:
        """Whether the first quote of a line opens a field."""
        opening = self._opening.search(line)
        return opening is not None and opening.end() == line.index('"') + 1

    def is_open_after(self, line: str, is_open: bool) -> bool:
        """Whether the end of a line is inside a quoted field, if only a quote before a delimiter or a line end closes.

        Args:
            line: A line of a row with broken quotes.
            is_open: Whether its beginning is inside a quoted field.
        """
        text, position = line.rstrip("\r\n"), 0
        while True:
            found = (self._closing if is_open else self._opening).search(text, position)
            if found is None:
                return is_open
            is_open, position = not is_open, found.end()
