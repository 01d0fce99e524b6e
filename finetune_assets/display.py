"""How texts and URLs from elsewhere are shown: in errors, log lines, terminals, Markdown and metadata.

Rows, names of files and columns, manifests, models and servers may contain anything: terminal escapes, marks that
reverse the reading direction, markup, and URLs with passwords.
"""

import logging
import re

HIDDEN_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff]"
)
"""Characters that control a terminal, change the order of other characters, or are invisible. The joiners that letters
and emoji consist of (U+200C, U+200D) are not among them."""
HIDDEN_BUT_LINES = re.compile(rf"(?![\n\t]){HIDDEN_CHARACTERS.pattern}")
LINE_END = re.compile(r"\r\n|\r|\n")
MARKDOWN = {"&": "&amp;", "<": "&lt;", "|": "\\|", **{mark: f"&#{ord(mark)};" for mark in "\\`*_[~"}}
"""What is written for characters with a meaning in Markdown or HTML."""
MARKDOWN_MARKS = re.compile(r"[&<|\\`*\[~]|(?<!\w)_|_(?!\w)")
"""Characters of `MARKDOWN`; an underscore inside of a word has no meaning."""
BLOCK_MARK = re.compile(r"\s*(?:[#+>=-]|\d+[.)])")
"""Beginning of a text that Markdown would take as a heading, list, quotation or line."""
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s<>\"]+)")
CLOSING = re.compile(r"['`)\]},.;:!]*\Z")
"""Punctuation behind a URL in a text."""
QUERY = re.compile(r"(?<=[\w/%~.-])\?[\w.%~-]+=[^\s<>\"')]*")
"""The query of a path whose scheme and host are written elsewhere, as in the errors of requests."""
USER = re.compile(
    r"(?i)(\b(?:https?|s3|hf|gs|az|ftp|smtps?|postgres(?:ql)?|mysql|redis):/+)[^\s/<>\"@]*@|(//)[^\s/<>\"'@:]+:[^\s/<>\"'@]+@"
)
"""User information where a path library has joined the slashes of a URL, or without a scheme."""
CREDENTIALS_OF_HUB = re.compile(r"(^|/)[^/@:]*:[^@]*@")
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{12,}|(?:gh[opsur]_|github_pat_|glpat-|xox[a-z]-|hf_|npm_|sk-|pypi-)[A-Za-z0-9_-]{16,}"
    r"|eyJ[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]+){1,2})"
)
"""Tokens with a form of their own, as paths of URLs may contain them."""
SECRET_PATHS = re.compile(
    r"((?:hooks\.slack\.com/(?:services|workflows|triggers)|discord(?:app)?\.com/api/webhooks|api\.telegram\.org)/)\S+",
    re.IGNORECASE,
)
"""Addresses whose path is a secret."""
LOCAL_SCHEMES = ("file",)


def plain(text: object, lines: bool = False) -> str:
    """A text without characters that control a terminal or hide other characters: these are written as escapes.

    Letters of all languages stay as they are.

    Args:
        text: The text.
        lines: Keep line ends and tabs; otherwise they are written as escapes too, so that the result is one line.
    """
    hidden = HIDDEN_BUT_LINES if lines else HIDDEN_CHARACTERS
    return hidden.sub(lambda found: ascii(found[0])[1:-1], str(text))


def markdown(text: object) -> str:
    """A text for a cell, list item or line of Markdown, in which Markdown and HTML are shown as written.

    Line ends become `<br>`, because a cell is a single line.
    """
    shown = MARKDOWN_MARKS.sub(lambda found: MARKDOWN[found[0]], plain(LINE_END.sub("\n", str(text)), lines=True))
    if block := BLOCK_MARK.match(shown):
        at = block.end() - 1
        shown = f"{shown[:at]}&#{ord(shown[at])};{shown[at + 1 :]}"
    return shown.replace("\n", "<br>")


def code(text: object) -> str:
    """A text as inline code of Markdown, also inside of a table."""
    return f"`{plain(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def shown_url(url: str) -> str:
    """A URL without user, password, query, fragment, and tokens that are recognized in its path."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() in LOCAL_SCHEMES:
        return url
    rest = _without_user(scheme.lower(), rest)
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return SECRET_PATHS.sub(r"\1(hidden)", TOKEN.sub("(hidden)", f"{scheme}://{rest}"))


def _without_user(scheme: str, rest: str) -> str:
    """The part behind `://` without user and password, also where they are not encoded and contain `/`, `?` or `#`."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        end = len(rest.partition("/")[0])
        return rest[rest[:end].rindex("@") + 1 :]
    _, colon, port = authority.partition(":")
    if colon and not port.isdigit() and not authority.startswith("[") and "@" in rest:
        return rest[rest.rindex("@") + 1 :]
    return CREDENTIALS_OF_HUB.sub(r"\1", rest) if scheme == "hf" else rest


def has_credentials(url: str) -> bool:
    """Whether a URL contains a user, a password or a token, which belong into environment variables."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() in LOCAL_SCHEMES:
        return False
    bare = re.split(r"[?#]", rest, maxsplit=1)[0]
    return _without_user(scheme.lower(), rest) != rest or shown_url(url) != f"{scheme}://{bare}"


def without_credentials(text: str) -> str:
    """A text, such as the error of a library, in which all URLs are shown as in `shown_url`."""
    if "/" not in text:
        return text
    text = URL.sub(_url_in_text, text)
    return USER.sub(r"\1\2", QUERY.sub("", text))


def _url_in_text(found: re.Match[str]) -> str:
    whole = found[0]
    end = CLOSING.search(whole).start()  # type: ignore[union-attr]
    return shown_url(whole[:end]) + whole[end:]


def message(text: object, lines: bool = False) -> str:
    """A message for people: `plain`, and without the credentials of URLs."""
    return plain(without_credentials(str(text)), lines)


class PlainRecords(logging.Filter):
    """Shows the messages of log records as `message` does; for handlers, whose filters see the records of all loggers.

    Args:
        lines: As in `plain`.
    """

    def __init__(self, lines: bool = False) -> None:
        super().__init__()
        self.lines = lines

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = message(record.getMessage(), self.lines), None
        return True
