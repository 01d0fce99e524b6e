"""The generated reference is current, and its texts agree with the code and with what a run leaves behind."""

import ast
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import dagster as dg
import pytest
from paths import ROOT

from docs import facts, reference
from finetune_assets.artifacts.kinds import KIND_OF, KINDS

PACKAGE = ROOT / "finetune_assets"
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
NOT_OURS = {"must have a PartitionsDefinition containing the passed partition key"}
"""Messages of Dagster."""


@pytest.mark.parametrize("name", reference.PAGES)
def test_page_is_current(name: str) -> None:
    assert (ROOT / "docs" / f"{name}.md").read_text("utf-8") == reference.page(name), "run `make docs`"


def test_every_asset_and_kind_is_described() -> None:
    assert set(facts.METADATA) == set(KIND_OF)
    assert set(facts.FILES) == {kind.folder for kind in KINDS}


def test_every_variable_is_described() -> None:
    code = "\n".join(file.read_text("utf-8") for file in PACKAGE.rglob("*.py"))
    documented = {name for variables in facts.VARIABLES.values() for name in variables}
    read = set(re.findall(r"(?<![A-Z_])FINETUNE_[A-Z_]*[A-Z]\b", code))
    assert read == {name for name in documented if name.startswith("FINETUNE_")} | facts.INTERNAL


@cache
def messages() -> set[str]:
    """Every text in the code, with a mark for each value that is filled in."""
    trees = [ast.parse(file.read_text("utf-8")) for file in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]
    return {" ".join("".join(pieces(node)).split()) for node in nodes}


def pieces(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from pieces(part)
    else:
        yield node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"


def documented_messages() -> list[str]:
    first_columns = re.findall(r"^\| (`.*?) \| ", TROUBLESHOOTING, re.MULTILINE)
    return sorted({text for column in first_columns for text in re.findall(r"`([^`]*)`", column) if " " in text})


@pytest.mark.parametrize("message", [text for text in documented_messages() if text not in NOT_OURS])
def test_message_is_of_the_code(message: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("...") if part.strip())
    assert any(re.search(pattern, text) for text in messages()), "no such message in the code"


def test_there_are_messages() -> None:
    assert len(documented_messages()) > 30


def is_described(name: str, described: dict[str, str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in described)


@pytest.mark.system
def test_metadata_and_files_of_a_run_are_described(first_run: Path) -> None:
    with dg.DagsterInstance.from_config(str(first_run / ".finetune" / "demo")) as instance:
        for asset, keys in facts.METADATA.items():
            found = instance.fetch_materializations(dg.AssetKey(asset), limit=1).records
            made = found[0].asset_materialization if found else None
            lacking = [key for key in (made.metadata if made else ()) if not is_described(key, keys | facts.COMMON)]
            assert not lacking, f"{asset}: describe {lacking} in docs/facts.py"
    manifests = [*(first_run / ".finetune" / "store").rglob("manifest.json")]
    assert len(manifests) > 8
    for manifest in manifests:
        kind = next(folder for folder in facts.FILES if f"/{folder}/" in str(manifest))
        files = [file["path"] for file in json.loads(manifest.read_text("utf-8"))["files"]]
        assert [file for file in files if not is_described(file, facts.FILES[kind])] == [], kind
