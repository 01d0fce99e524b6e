"""Planted secrets through the graph: the check names them, and no log, metadata or statistics show them."""

import json
from typing import Any

import dagster as dg
import pytest
from integration.graph import Graph
from planted import PLANTED
from projects import TestProject

QUARANTINED = 3


@pytest.fixture
def planted(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source with each planted secret in a row and in a conversation, with repeated rows, and with bad rows."""
    texts = [text for _, text, _ in PLANTED]
    rows: list[Any] = [{"instruction": text, "response": f"It is {text}", "category": "a"} for text in texts]
    rows += [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}] * 2} for text in texts
    ]
    rows += [rows[number] for number in range(5)]
    rows += [{"instruction": [text], "response": "x"} for text in texts[:QUARANTINED]]
    source = project.root / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("FINETUNE_RAW_DATA", str(source))


def checks(graph: Graph, run: Any) -> dict[str, dg.AssetCheckEvaluation]:
    return {check.check_name: check for check in run.result.get_asset_check_evaluations()}


def test_secrets_are_listed_and_shown_nowhere(planted: None, project: TestProject, graph: Graph) -> None:
    run = graph.run("dolly_raw", partition=None)
    evaluations = checks(graph, run)
    check = evaluations["sensitive"]
    (statistics,) = project.store_root.glob("tests/raw/*/*/statistics.json")
    shown = {
        "log": run.log,
        "metadata": str(run.metadata("dolly_raw")),
        "checks": str([(each.description, each.metadata) for each in evaluations.values()]),
        "statistics": statistics.read_text(),
    }
    pieces = [
        line[at : at + 8]
        for _, _, secret in PLANTED
        for line in secret.split("\n")
        for at in range(0, len(line) - 7, 4)
    ]
    assert {name: [piece for piece in pieces if piece in text] for name, text in shown.items()} == {
        name: [] for name in shown
    }
    assert (check.passed, check.severity, check.blocking) == (False, dg.AssetCheckSeverity.WARN, False)
    assert check.metadata["rows"].value == 2 * len(PLANTED) + 5
    findings = json.loads(statistics.read_text())["sensitive"]["first"]
    table = str(check.metadata["first_findings"].value)
    for number, (kind, _, _) in enumerate(PLANTED):
        assert kind in check.metadata["kinds"].value
        assert any(each["kind"] == kind and each["row"] <= number for each in findings)
    assert all(f"| {each['kind']} | {each['row']} | {each['field']} | " in table for each in findings)
    assert "turn 1" not in {each["field"] for each in findings[:1]}
    assert evaluations["quarantine"].metadata["rows"].value == QUARANTINED


def test_a_raised_threshold_lets_rows_through(planted: None, project: TestProject, graph: Graph) -> None:
    with open(project.configs / "raw_data.yaml", "a", encoding="utf-8") as settings:
        settings.write("\nchecks: {max_sensitive_share: 1.0}\n")
    run = graph.run("dolly_raw", partition=None)
    assert checks(graph, run)["sensitive"].passed


def test_rows_without_secrets_pass(project: TestProject, graph: Graph) -> None:
    run = graph.run("dolly_raw", partition=None)
    check = checks(graph, run)["sensitive"]
    assert (check.passed, check.metadata["rows"].value, check.metadata["examples"].value) == (True, 0, 0)
