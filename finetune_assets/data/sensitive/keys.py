"""Private keys, passwords in addresses, and values that are assigned to a name such as `password` or `api_key`."""

import re

from finetune_assets.data.sensitive.kind import HIDDEN, Kind, entropy

QUOTE = r"\\{0,3}[\"'`]"
GIVEN = r"\s{0,3}(?:=>|:=|==?|:)\s{0,3}"
"""Between a name and its value."""
NAMES = (
    r"pass(?:word|wd|phrase|code)|pwd|secret(?:[_ -]?(?:access[_ -]?)?key)?|client[_ -]?secret|api[_ -]?key|"
    r"(?:access|auth|refresh|bearer|api|secret|bot|session)[_ -]?token|(?:private|encryption|account|access)[_ -]?key|"
    r"connection[_ -]?password|credentials?|token"
)
HINTS = (
    *("assw", "asscode", "assphr", "pwd", "ecret", "oken", "redential"),
    *("ASSW", "ASSCODE", "ASSPHR", "PWD", "ECRET", "OKEN", "REDENTIAL"),
    *("_key", "-key", " key", "iKey", "ikey", "_KEY", "-Key", "-KEY", " KEY", " Key", "sKey", "tKey", "eKey", "nKey"),
    *("skey", "tkey", "ekey", "nkey", "IKEY", "SKEY", "TKEY", "EKEY", "NKEY"),
)
SIEVE = r"(?i:" + NAMES + r")[\\\"'`]{0,4}\s{0,3}[=:]"
PLACEHOLDER = re.compile(
    r"(?i)your|example|placeholder|change[_-]?me|dummy|sample|redacted|insert|replace|x{4}|\*{3}|\.{3}|…|\$[{(]|\{\{|%\(|"
    r"^[<\[{%$@].*[>\]}%]?$|environ|getenv|process\.env|config\.|settings\.|args\.|self\.|"
    r"^(?:my|the|new|old|db|user|root|admin|super|some|top)?[_-]?(?:pass(?:word|wd|phrase)?|pwd|secret|token|key|api[_-]?key)"
    r"[_-]?(?:here|\d{1,4})?!?$|^(?:foo|bar|test|demo|abc)\w{0,4}$|^(?:12345|qwerty|abcdef)"
)
"""Values that stand for a secret, or are code that reads one."""
CODE = re.compile(
    r"[()\[\]{}<>;,]|(?i:^[A-Za-z_][\w.]*(?:credential|token|secret|password|key)\w*$)|\w\.\w+\.?\w*\(|::|->"
)
"""Occurs in an expression, and hardly in a key."""
LEAST_QUOTED, LEAST_BARE = 2.3, 3.0
"""Least entropy of a quoted value and of one without quotes, in bits per character."""


def _kinds_of_characters(value: str) -> int:
    return sum(bool(re.search(kind, value)) for kind in ("[a-z]", "[A-Z]", "[0-9]", r"[^A-Za-z0-9\s]"))


def _is_quoted_value(value: str) -> bool:
    return (
        not PLACEHOLDER.search(value)
        and entropy(value) >= LEAST_QUOTED
        and bool(re.search(r"[0-9]|[^\w\s.-]", value))
        and _kinds_of_characters(value) >= 2
    )


def _is_bare_value(value: str) -> bool:
    return (
        not PLACEHOLDER.search(value)
        and not CODE.search(value)
        and entropy(value) >= LEAST_BARE
        and bool(re.search(r"[A-Za-z]", value) and re.search(r"[0-9]|[a-z][A-Z].*[!@#$%^&*?]", value))
        and not re.fullmatch(r"(?:https?|ftp)://.*|[\d./:-]+[a-z]{0,2}|/[\w./-]+", value)
    )


def _is_aws_secret(value: str) -> bool:
    return entropy(value) >= 4.0 and _kinds_of_characters(value) >= 3


def _is_spoken_value(value: str) -> bool:
    return _is_bare_value(value) and _kinds_of_characters(value) >= 3


def _is_address_password(text: str) -> bool:
    password = text.split("://", 1)[1].partition(":")[2][:-1]
    return not PLACEHOLDER.search(password) and not re.fullmatch(
        r"\d{1,5}|pass|pw|postgres|guest|admin|root|tiger", password
    )


def _hide_address(text: str) -> str:
    return f"{text.partition('://')[0]}://{HIDDEN}@"


def _hide_block(text: str) -> str:
    return f"{text[: text.find('-----', 5) + 5]} {HIDDEN}"


def _has_key_body(text: str) -> bool:
    return re.search(r"[A-Za-z0-9+/=]{30}", text) is not None


def _hide_all(text: str) -> str:
    return HIDDEN


KEYS: tuple[Kind, ...] = (
    Kind(
        "private key",
        re.compile(
            r"(?s)-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:(?!-----).){40,}?"
            r"(?:-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|\Z)"
        ),
        ("PRIVATE KEY",),
        _has_key_body,
        _hide_block,
    ),
    Kind(
        "PuTTY private key",
        re.compile(
            r"(?s)PuTTY-User-Key-File-\d: (?:(?!Private-Lines).){1,20000}?"
            r"Private-Lines: \d+(?P<secret>(?:\\{1,3}[nr]|[\sA-Za-z0-9+/=]){30,})"
        ),
        ("PuTTY-User-Key-File-",),
        hide=_hide_all,
    ),
    Kind(
        "password in an address",
        re.compile(
            r"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s:/@\"'<>]{0,100}:[^\s/@\"'<>]{3,200}@(?=[A-Za-z0-9\[])"
        ),
        ("@",),
        _is_address_password,
        _hide_address,
        sieve=r"://[^\s@]{5,300}@",
    ),
    Kind(
        "AWS secret key",
        re.compile(
            r"(?i:(?<![a-z])aws|secret[_ -]?access[_ -]?key)[A-Za-z0-9_ .-]{0,40}"
            + f"(?:{QUOTE})?"
            + r"[\s=:>,]{1,6}"
            + f"(?:{QUOTE})?"
            + r"(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
        ),
        ("aws", "AWS", "Aws", "ecret", "ECRET"),
        _is_aws_secret,
        is_example=lambda value: value.endswith("EXAMPLEKEY"),
        sieve=r"(?i:(?:^|[^a-z])aws[^a-z]|secret[_ -]?access)",
    ),
    Kind(
        "Azure storage key",
        re.compile(r"AccountKey=(?P<secret>[A-Za-z0-9+/]{80,90}={0,2})"),
        ("AccountKey=",),
    ),
    Kind(
        "authorization header",
        re.compile(
            r"(?i:authorization)"
            + f"(?:{QUOTE})?"
            + r"\s{0,3}[:=,]\s{0,3}"
            + f"(?:{QUOTE})?"
            + r"(?i:bearer|basic|token)\s+(?P<secret>[A-Za-z0-9_.+/=~-]{16,})"
        ),
        ("uthorization",),
        _is_bare_value,
    ),
    Kind(
        "assigned secret",
        re.compile(
            f"(?<!::)(?i:{NAMES})(?:{QUOTE})?{GIVEN}(?P<quote>{QUOTE})" + r"(?P<secret>[^\s\"'`\\]{6,200})(?P=quote)"
        ),
        HINTS,
        _is_quoted_value,
        sieve=SIEVE,
    ),
    Kind(
        "assigned secret",
        re.compile(r"(?i:" + NAMES + r")\s{0,2}[:=]\s{0,2}(?P<secret>[^\s\"'`,;\\]{8,200})"),
        HINTS,
        _is_bare_value,
        sieve=SIEVE,
    ),
    Kind(
        "assigned secret",
        re.compile(
            r"(?i:pass(?:word|phrase|code))\s(?i:is|was)[\s:]{1,3}(?:[\"'`])?(?P<secret>[^\s\"'`]{6,100}[^\s\"'`.,!?])"
        ),
        ("assw", "assphr", "asscode", "ASSW", "ASSPHR", "ASSCODE"),
        _is_spoken_value,
        sieve=r"(?i:pass(?:word|phrase|code)\s(?:is|was)\s)",
    ),
)
