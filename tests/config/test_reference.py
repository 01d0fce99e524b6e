"""The reference of settings is complete and true."""

from dataclasses import fields

import pytest
from paths import ROOT

from finetune_assets.config import schema
from finetune_assets.config.reference import docstrings, reference

GROUPS = [
    value for value in vars(schema).values() if isinstance(value, type) and hasattr(value, "__dataclass_fields__")
]


def test_docs_are_what_the_schema_says() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == reference(), "run `make docs`"


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_setting_is_explained(group: type) -> None:
    texts = docstrings(group)
    for field in fields(group):
        assert len(texts[field.name]) > 10, f"{group.__name__}.{field.name} has no text below it"
