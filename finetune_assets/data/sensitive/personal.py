"""Personal data: e-mail addresses, payment cards, bank accounts and phone numbers."""

import re

from finetune_assets.data.sensitive.kind import HIDDEN, START, Kind

FILE_ENDINGS = frozenset(
    "png jpg jpeg gif svg webp ico bmp css js ts jsx tsx py rb rs go java kt cpp html htm php json yml yaml xml txt md "
    "pdf zip gz tar exe dll so mean sum T shape".split()
)
"""What follows the last dot in `icon@2x.png` and in `a@b.T`, and is no top-level domain of addresses."""
RESERVED = re.compile(
    r"(?i)(?:^|[.])(?:example(?:\.(?:com|net|org|edu))?|test|invalid|localhost|local|localdomain|internal|lan)$"
)
"""Reserved domains, which have no mailboxes (RFC 2606, RFC 6762)."""
SERVICE = frozenset({"git", "noreply", "no-reply", "donotreply", "do-not-reply", "hg", "svn"})
"""Names before `@` that are of services."""

CARDS: tuple[tuple[int, str], ...] = (
    (16, r"4|5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|6011|64[4-9]|65|352[89]|35[3-8]|30[0-5]|36|3[89]|62|81"),
    (16, r"50(?:18|20|38)|58(?:93|68)|6304|6759|676[1-3]"),
    (15, r"3[47]"),
    (14, r"30[0-5]|36|3[89]"),
)
"""Lengths and first digits of cards: Visa, Mastercard, Discover, JCB, Diners, UnionPay; Maestro; American Express.
Cards of 13 and of 17 to 19 digits, which are rare, are not recognised: such numbers are mostly article numbers."""
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HN": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19,
    "MN": 20, "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29,
    "PT": 25, "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24,
    "SM": 27, "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
    "YE": 30,
}  # fmt: skip
"""Characters of an IBAN by country (the registry of ISO 13616)."""

CALLING_CODES = re.compile(
    r"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|"
    r"2(?:1[1-368]|[2346]\d|5[0-8]|9[0179])|3(?:5\d|7[0-8]|8[0-35-79])|42[013]|50\d|59\d|6(?:7[02-9]|8[0-35-9]|9[0-2])|"
    r"8(?:00|5[0256]|8[06])|9(?:6[0-8]|7[0-7]|9[2-68])"
)
"""Country calling codes (ITU-T E.164)."""


BEFORE_NUMBER = r"(?:(?<![\w.+-])|(?<=\\[nrt]))"
"""Start of a number that is no part of a longer one, of a word or of an identifier."""


def _has_mailbox_domain(address: str) -> bool:
    return address.rpartition(".")[2] not in FILE_ENDINGS


def _is_reserved(address: str) -> bool:
    name, _, domain = address.rpartition("@")
    return bool(RESERVED.search(domain)) or name.lower() in SERVICE


def _hide_email(address: str) -> str:
    name, _, domain = address.rpartition("@")
    return f"{name[0]}{HIDDEN}@{domain[0]}{HIDDEN}.{domain.rpartition('.')[2]}"


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the Luhn check digit of the others."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def is_card(text: str) -> bool:
    """Whether a text is the number of a payment card: separators, first digits, length, and check digit."""
    digits = re.sub(r"\D", "", text)
    known = any(len(digits) == length and re.match(first, digits) for length, first in CARDS)
    return known and len(set(digits)) > 1 and passes_luhn(digits)


def _hide_card(text: str) -> str:
    return f"{HIDDEN}{re.sub(r'[^0-9]', '', text)[-4:]}"


def is_iban(text: str) -> bool:
    """Whether a text is an IBAN: length of its country, and check digits (ISO 7064, mod 97)."""
    plain = re.sub(r"[ -]", "", text)
    if IBAN_LENGTHS.get(plain[:2]) != len(plain):
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def _iban_pattern() -> str:
    """IBANs by country, so that a word after one is no part of it; in one run, or in groups of four."""
    by_length: dict[int, list[str]] = {}
    for country, length in IBAN_LENGTHS.items():
        by_length.setdefault(length, []).append(country)
    forms = []
    for length, countries in by_length.items():
        groups, rest = divmod(length - 4, 4)
        last = f"(?P=gap{length})[A-Z0-9]{{{rest}}}" if rest else ""
        grouped = f"(?P<gap{length}>[ -]?)[A-Z0-9]{{4}}(?:(?P=gap{length})[A-Z0-9]{{4}}){{{groups - 1}}}{last}"
        forms.append(f"(?:{'|'.join(countries)})[0-9]{{2}}{grouped}")
    return rf"{START}(?:{'|'.join(forms)})(?![A-Za-z0-9])"


def _hide_iban(text: str) -> str:
    return f"{text[:2]}{HIDDEN}{text[-2:]}"


def is_phone(text: str) -> bool:
    """Whether a text is an international phone number: known country, plausible length, not a decimal number."""
    digits = re.sub(r"\D", "", text)
    code = CALLING_CODES.match(digits)
    if not code or not 9 <= len(digits) <= 15 or len(set(digits)) < 4 or re.fullmatch(r"\+\d+\.\d+", text):
        return False
    if text.count("(") != text.count(")"):
        return False
    if digits[0] == "1":
        return len(digits) == 11 and digits[1] in "23456789" and digits[4] in "23456789"
    return True


def _is_fictitious(text: str) -> bool:
    return bool(re.fullmatch(r"1\d{3}55501\d\d", re.sub(r"\D", "", text)))


def _hide_phone(text: str) -> str:
    return f"{text[:3]}{HIDDEN}{text[-2:]}"


PERSONAL: tuple[Kind, ...] = (
    Kind(
        "e-mail address",
        re.compile(
            r"(?<![\w.+%@/-])[A-Za-z0-9](?:[\w.+%'-]{0,62}[\w+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
            r"[A-Za-z]{2,24}(?![\w(@-])"
        ),
        ("@",),
        _has_mailbox_domain,
        _hide_email,
        _is_reserved,
    ),
    Kind(
        "payment card",
        re.compile(
            BEFORE_NUMBER + r"(?<!\d\.)(?<!\b0,)(?=(?P<secret>"
            r"\d{4}(?P<gap>[ .\u00a0-])\d{4}(?P=gap)\d{4}(?P=gap)\d{4}|"
            r"\d{4}(?P<space>[ .\u00a0-])\d{6}(?P=space)\d{4,5}|\d{14,16}"
            r")(?![\w-])(?!\.\d))"
        ),
        (),
        is_card,
        _hide_card,
        sieve=r"[0-9](?:[ . -]?[0-9]){13}",
    ),
    Kind(
        "IBAN",
        re.compile(_iban_pattern()),
        (),
        is_iban,
        _hide_iban,
        sieve=r"[A-Z]{2}[0-9]{2}[ -]?[A-Z0-9]{4}[ -]?[A-Z0-9]{4}",
    ),
    Kind(
        "phone number",
        re.compile(
            r"(?:(?<![\w+./)\]-])(?<![\d)] )|(?<=\\[nrt]))"
            r"\+[1-9](?:(?:[ .\u00a0-]|\) ?| ?\()?\d){8,14}(?![\w+=*/^-])(?! ?[=*/^])"
        ),
        ("+",),
        is_phone,
        _hide_phone,
        _is_fictitious,
        sieve=r"\+[1-9][0-9 .()-]{8}",
    ),
)
