"""Secrets and personal data: which are found, which resemble them, and how they are shown."""

import json
import uuid
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from planted import BARE, PLANTED, QUOTED, card, grouped, iban, key_body, private_key
from raw import ingest

from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.data.errors import BadRow, DataError
from finetune_assets.data.ingest import write_raw
from finetune_assets.data.layouts.values import shortened
from finetune_assets.data.readers import SourceFile, read_records
from finetune_assets.data.sensitive import KINDS, Sensitive, SensitiveScan, find, masked, masked_values, scan_rows
from finetune_assets.data.tables import conversations_table, rows_table

AROUND = ["{}", "First.\n{}\nLast.", 'x = f("""{}""")', "a, b\n1,{}", "- **{}**", "é日本 {} 🎉"]
TOKEN = next(secret for kind, _, secret in PLANTED if kind == "GitHub token")


def row(instruction: str, response: str = "It is so.", messages: Any = None) -> dict[str, Any]:
    return {"instruction": instruction, "context": "", "response": response, "category": "", "messages": messages}


def scanned(*rows: dict[str, Any]) -> Sensitive:
    scan = SensitiveScan()
    scan.add(scan_rows(rows))
    return scan.sum_up()


def kinds(text: str) -> list[str]:
    return [finding.kind for finding in find(text) if not finding.is_example]


def shows(text: str, secret: str) -> bool:
    """Whether a text has more of a secret than its ends: any eight characters in a row."""
    return any(secret[at : at + 8] in text for at in range(max(1, len(secret) - 7)))


def test_every_kind_has_a_planted_example() -> None:
    assert {kind.name for kind in KINDS} == {kind for kind, _, _ in PLANTED}
    assert len({kind for kind, _, _ in PLANTED}) >= 20


@pytest.mark.parametrize(("kind", "text", "secret"), PLANTED)
def test_a_secret_is_found_and_hidden(kind: str, text: str, secret: str) -> None:
    texts = [around.format(text) for around in AROUND]
    assert all(kind in kinds(text) for text in texts)
    assert not any(shows(masked(text), secret) for text in texts)
    assert scanned(*map(row, texts)).findings[kind] == len(AROUND)


@pytest.mark.parametrize(("kind", "text", "secret"), PLANTED)
def test_a_secret_is_hidden_in_json_too(kind: str, text: str, secret: str) -> None:
    """As in quarantined rows and in arguments of tool calls, where line breaks and quotes are escaped."""
    once = json.dumps({"text": f"First.\n{text}\nLast."})
    for shown in (masked(once), masked(json.dumps({"row": once}))):
        assert all(line not in shown for line in secret.split("\n") if len(line) >= 8)


@pytest.mark.parametrize(("kind", "text", "secret"), PLANTED)
def test_what_is_shown_is_not_found_again(kind: str, text: str, secret: str) -> None:
    assert find(masked(text)) == []
    assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("jdoe@mailbox.org", "j***@m***.org"),
        (grouped("4012888888881881"), "***1881"),
        ("DE89 3704 0044 0532 0130 00", "DE***00"),
        (TOKEN, f"ghp_***{TOKEN[-2:]}"),
        ("postgres://me:hunter2x@localhost/db", "postgres://***@localhost/db"),
        (f'password = "{QUOTED}"', f'password = "{QUOTED[0]}***"'),
        (private_key("EC ", key_body()), "-----BEGIN EC PRIVATE KEY----- ***"),
    ],
)
def test_a_finding_shows_too_little_to_use_it(text: str, shown: str) -> None:
    assert masked(f"So: {text} it is.") == f"So: {shown} it is."


@pytest.mark.parametrize(
    "text",
    [
        str(uuid.UUID(int=0x41111111111111111111111111111111)),
        f"commit {sha256(b'a').hexdigest()}",
        f"sha256-{sha256(b'b').hexdigest()[:40]}",
        "data:image/png;base64," + "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8" * 20,
        "ISBN 978-3-16-148410-0 and 9783161484100",
        "id 1234567890123456, order 1700000000000000",
        "3.1415926535897932 and 0.4111111111111111 and 0,4111111111111111",
        "4111111111111112",
        "4" * 16,
        "a41111111111111111b x4012888888881881",
        "DE89 3704 0044 0532 0130 01",
        "XX89 3704 0044 0532 0130 00",
        "version +1.2.3.4 and 10.0.0.1",
        "2 +123456789 = x, f(x) +4915123456789, 5+4915123456789",
        "+40.7128 -74.0060 and +1234567.89012",
        "2023-01-01T00:00:00+0100",
        "+1 234 567 890 and +100000000000 and +999123456789",
        "icon@2x.png, a@b.T, @user, user@host, x@y.shape",
        "password: required, token: str, secret: It is only with the heart",
        'password = "password", api_key = "your-api-key", token = "<TOKEN>", secret = "changeme"',
        'api_key = os.environ["KEY"], password=getpass(), token: ${{ secrets.TOKEN1 }}',
        "ghp_" + "x" * 36,
        "sk-learn, task-force, disk-1234567890123456789012345678901234567890",
        "https://user:password@host/ and http://a.b:8080/x@y",
        "-----BEGIN PRIVATE KEY----- is the first line",
        "eyJhbGciOi is how a token begins",
        "Call 555-0123 or (415) 867-5309",
        "The secret to success: work100percent",
    ],
)
def test_no_false_alarm(text: str) -> None:
    assert kinds(text) == []
    assert masked(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "someone@example.com",
        "a.b@mail.example.org",
        "x@some.test",
        "git@github.com",
        "AKIAIOSFODNN7EXAMPLE",
        "+1 415 555 0132",
    ],
)
def test_placeholders_are_counted_and_are_no_findings(text: str) -> None:
    found = scanned(row(f"Such as {text} here."))
    assert (found.rows, found.findings, found.examples) == (0, {}, 1)
    assert masked(text) == text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{card('4', 16)} {card('51', 16)}", "payment card"),
        (f"1990 {grouped(card('4', 16))}", "payment card"),
        (f"name,{card('4', 16)},12/29", "payment card"),
        (grouped(card("4", 16)).replace(" ", "\u00a0"), "payment card"),
        (grouped(card("4", 16)).replace(" ", "-"), "payment card"),
        (f"iban={iban('FR')};", "IBAN"),
        (f"{iban('NO')} OSLO", "IBAN"),
        ("tel:+442079460958", "phone number"),
        ("Max,+4915123456789,Berlin", "phone number"),
        ("mailto:max@mailbox.org?subject=x", "e-mail address"),
        ("<max@mailbox.org>", "e-mail address"),
        ('{"password": "' + QUOTED + '"}', "assigned secret"),
        ('{\\"password\\": \\"' + QUOTED + '\\"}', "assigned secret"),
        (f"export API_TOKEN={BARE}", "assigned secret"),
        (f"PASSWORD={BARE}", "assigned secret"),
        (f"print(1)\\nkey = {TOKEN}\\n", "GitHub token"),
    ],
)
def test_neighbours_are_found(text: str, kind: str) -> None:
    assert kind in kinds(text)


@pytest.mark.parametrize("length", range(12, 40, 3))
def test_a_key_that_is_cut_off_is_hidden(length: int) -> None:
    assert not shows(masked(f"The key is {TOKEN[:length]}"), TOKEN)


def test_rows_fields_and_turns_are_named() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Use {TOKEN}."}]
    found = scanned(
        row("Why?"), row("Who?", "Ask max@mailbox.org, moritz@mailbox.org."), row("Hi", turns[1]["content"], turns)
    )
    assert (found.rows, found.findings) == (2, {"e-mail address": 2, "GitHub token": 1})
    assert [(each["row"], each["field"], each["kind"]) for each in found.first] == [
        (1, "response", "e-mail address"),
        (1, "response", "e-mail address"),
        (2, "turn 2", "GitHub token"),
    ]


def test_arguments_of_a_tool_call_are_searched() -> None:
    call = [{"type": "function", "function": {"name": "mail", "arguments": '{"to": "max@mailbox.org"}'}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": call}]
    (only,) = scanned(row("Hi", "", turns)).first
    assert (only["kind"], only["field"]) == ("e-mail address", "turn 2, tool_calls")


@pytest.mark.parametrize(("kind", "text", "secret"), PLANTED)
def test_a_tool_call_that_is_shown_is_still_json(kind: str, text: str, secret: str) -> None:
    """Also where a secret is cut off or ends at a quote, so that hiding it in the text would take a quote with it."""
    for said in (text, f'echo "{text}"', f"x\\{text}\\", f"{text}\n-----BEGIN PRIVATE KEY-----\n{'b' * 64}"):
        call = json.dumps([{"function": {"name": "run", "arguments": {"command": said}}}])
        (shown,) = json.loads(masked_values([call])[0])
        assert not shows(shown["function"]["arguments"]["command"], secret)


def test_counts_of_hidden_names_are_added() -> None:
    assert masked_values({"ann@mailbox.org": 2, "abe@mailbox.org": 3, "b": 1}) == {"a***@m***.org": 5, "b": 1}


def test_row_numbers_go_over_batches() -> None:
    scan = SensitiveScan()
    for text in ("Why?", "max@mailbox.org", TOKEN):
        scan.add(scan_rows([row("Who?"), row(text)]))
    assert [each["row"] for each in scan.sum_up().first] == [3, 5]


def test_at_most_five_of_a_kind_are_listed_and_all_are_counted() -> None:
    found = scanned(*(row(f"someone{number}@mailbox.org") for number in range(9)))
    assert (found.rows, found.findings, len(found.first)) == (9, {"e-mail address": 9}, 5)


def test_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    """Nothing is rewritten: neither good rows nor the quarantine file, which are the user's own data."""
    source = tmp_path / "rows.jsonl"
    source.write_text(
        json.dumps({"instruction": "Key?", "response": TOKEN}) + "\n" + json.dumps({"prompt": TOKEN}) + "\n"
    )
    (kept,) = pq.read_table(ingest(tmp_path / "raw", source)).to_pylist()
    assert kept["response"] == TOKEN
    assert TOKEN in (tmp_path / "raw" / "quarantine.jsonl").read_text()


def test_statistics_show_no_secret(tmp_path: Path) -> None:
    """Neither of previews, of repeated rows, of bad rows and their reasons, nor of categories."""
    good = {"instruction": f"Use {TOKEN}?", "response": "Yes", "category": TOKEN}
    chat = {"messages": [{"role": "user", "content": TOKEN}, {"role": "assistant", "content": TOKEN}] * 2}
    bad = [{"instruction": [TOKEN], "response": "x"}, {TOKEN: "x"}, [TOKEN], {"messages": [{"role": TOKEN}]}]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in [good, good, chat, *bad]))
    statistics = write_raw([SourceFile("rows.jsonl", source)], Columns(), tmp_path)
    assert (statistics.rows, statistics.quarantined, statistics.sensitive.rows) == (3, 4, 3)
    assert {*statistics.shown} >= {"0", "1"}
    assert not shows(json.dumps(asdict(statistics)), TOKEN)


def test_errors_show_no_secret(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(f"a;{TOKEN};c\n1;2;3\n")
    with pytest.raises(DataError) as raised:
        list(read_records(source))
    assert "rows.csv:1" in str(raised.value)
    assert not shows(str(raised.value), TOKEN)
    assert not shows(str(BadRow(f"unknown key '{TOKEN}'")), TOKEN)
    assert not shows(shortened({"a": "x" * 30 + " " + TOKEN}), TOKEN[:20])


def test_tables_hide_before_they_shorten() -> None:
    text = "x" * 140 + f" {TOKEN}"
    turns = [{"role": "user", "content": text}]
    assert not shows(rows_table([{"text": text}], ["text"]), TOKEN)
    assert not shows(conversations_table([row("", messages=turns)]), TOKEN)


def test_a_million_characters_are_searched_in_linear_time() -> None:
    for text in (
        "a" * 1_000_000,
        "1 " * 500_000,
        "a@" * 300_000,
        "eyJ" * 300_000,
        "password=" * 100_000,
        "+4 " * 300_000,
    ):
        assert isinstance(masked(text), str)
