"""The pages about security: what they name as proof is there, and what they give to copy is valid."""

import json
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from paths import ROOT
from reading.blocks import blocks
from servers.kubernetes import VERSION

from finetune_assets.artifacts.kinds import BASE_MODELS

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("security", "securing", "supply-chain", "signing", "ui-access")]
TEXT = "\n".join(page.read_text("utf-8") for page in PAGES)
BLOCKS = [block for page in PAGES for block in blocks(page)]
POLICIES = [json.loads(block.text) for block in BLOCKS if block.language == "json"]


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:tests|finetune_assets|deploy|requirements)/[^`*]*)`", TEXT)))
)
def test_proof_is_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("variable", sorted(set(re.findall(r"FINETUNE_[A-Z_]+", TEXT))))
def test_variable_is_read(variable: str) -> None:
    assert any(variable in file.read_text("utf-8") for file in (ROOT / "finetune_assets").rglob("*.py"))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`[^`\n]*make ([a-z]+)", TEXT))))
def test_make_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_only_one_role_writes_base_models() -> None:
    shared = f"arn:aws:s3:::my-bucket/finetune/{BASE_MODELS.folder}/*"
    role, bucket = ({one["Sid"]: one for one in policy["Statement"]} for policy in POLICIES)
    assert role["ReadBaseModels"]["Resource"] == bucket["OneRoleWritesBaseModels"]["Resource"] == shared
    assert role["ReadBaseModels"]["Action"] == "s3:GetObject"
    denied: dict[str, Any] = bucket["OneRoleWritesBaseModels"]
    assert denied["Effect"] == "Deny"
    assert set(denied["Action"]) == {"s3:PutObject", "s3:DeleteObject"}
    written = [one["Resource"] for one in role.values() if "s3:PutObject" in one["Action"]]
    assert written == ["arn:aws:s3:::my-bucket/finetune/production/*"]


def test_network_policies_are_what_kubernetes_knows() -> None:
    trees = [tree for b in BLOCKS if b.language == "yaml" for tree in yaml.safe_load_all(b.text)]
    assert [tree["kind"] for tree in trees] == ["NetworkPolicy", "NetworkPolicy"]
    for tree in trees:
        kubernetes_validate.validate(tree, VERSION, strict=True)
