"""Generates the settings reference from the schema: `python -m finetune_assets.config.reference`."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from finetune_assets.config.documents_schema import DocumentsConfig
from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.config.schema import ExperimentConfig, StoreConfig, SweepConfig
from finetune_assets.config.typed_yaml import group_of

TARGET = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """# Every setting

Generated from `finetune_assets/config/` by `python -m finetune_assets.config.reference`; do not edit.

A setting marked † cannot change an artifact's bytes, so changing it re-runs nothing. Overrides of one run apply to all
its assets and are given as dotted strings. A setting marked ‡ names code to run, or decides as whom and beside which
secrets a job runs: it must be written in a file, and is refused as an override, because everyone who reaches Dagster's
UI can launch runs with overrides.

<!-- run -->
```sh
finetune run demo --select '*lora_adapter' --set training.max_steps=5 --set lora.rank=4
```

## How values are read

The type of a setting decides what its value is:

- A setting of type `str` keeps the text as written: `account: 0017`, `partition: off`, `time_limit: 12:00:00` and
  `revision: 1e10` need no quotes. Only the text `null` does.
- A number may be written as `1e-4`, `0.0001` or `1_000`. Numbers with a leading zero, `inf` and `nan` are errors.
- A group or list with nothing after its colon, for example because all its lines are commented out, is not set. An
  optional group (`merge`, `wandb`, `stack`, `evaluation.lm_eval`) that is named but empty has its defaults; `null`
  switches it off.
- A name that is set twice, and YAML tags such as `!!binary`, are errors.

An override takes the text after `=` as it is, also `:`, `#` and braces. Lists and groups are written as in YAML:
`--set 'lora.target_modules=[q_proj, v_proj]'`. Names with dots need no quotes:
`--set lora.rank_pattern.layers.0.self_attn.q_proj=4`.
"""


def reference() -> str:
    """The page in Markdown."""
    experiment = _tables(ExperimentConfig, "", "An experiment (`configs/experiments/NAME.yaml`)")
    sweep = _tables(SweepConfig, "", "A sweep (`configs/sweeps/NAME.yaml`)")
    raw = _tables(RawDataConfig, "", "Raw data (`configs/raw_data.yaml`)")
    documents = _tables(DocumentsConfig, "", "A document set (`configs/documents/NAME.yaml`)")
    store = _tables(StoreConfig, "", "The store (`configs/store.yaml`)")
    return "\n".join([HEAD, *experiment, *sweep, *raw, *documents, *store])


def _tables(schema: type, path: str, title: str) -> Iterator[str]:
    hints, texts = get_type_hints(schema), docstrings(schema)
    groups = [(field, group_of(hints[field.name])) for field in fields(schema)]
    rows = [_row(field, hints[field.name], texts[field.name]) for field, group in groups if not group]
    if rows:
        yield f"## {title}\n\n{inspect.getdoc(schema)}\n"
        yield "\n".join(["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""])
    for field, group in groups:
        inner = f"{path}.{field.name}" if path else field.name
        if group:
            yield from _tables(group, inner, f"`{inner}`")
        elif member := _member(hints[field.name]):
            yield from _tables(member, f"{inner}.NAME", f"`{inner}.NAME`")


def _member(hint: Any) -> type | None:
    """The dataclass of a dictionary's values, if any."""
    values = get_args(hint)[1:] if get_origin(hint) is dict else ()
    return next((value for value in values if is_dataclass(value) and isinstance(value, type)), None)


def _row(field: Field[Any], hint: Any, text: str) -> str:
    mark = ("" if field.metadata.get("identity", True) else " †") + (" ‡" if field.metadata.get("in_file_only") else "")
    meaning = " ".join(text.split()).replace("|", "\\|")
    return f"| `{field.name}`{mark} | {_type(hint)} | {_default(field)} | {meaning} |"


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " ".join(f"`{option}`" for option in get_args(hint))
    if hint is Any:
        return "see meaning"
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    name = re.sub(r"[\w.]+\.(\w+)", r"\1", name)
    return f"`{name}`".replace("|", "\\|")


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
    if value == MISSING:
        return "must be set"
    if value == "":
        return "empty"
    return f"`{json.dumps(value)}`".replace("|", "\\|") if not isinstance(value, str) else f"`{repr(value)[1:-1]}`"


def docstrings(schema: type) -> dict[str, str]:
    """The docstring below each attribute of a dataclass, which Python does not retain at runtime."""
    (definition,) = ast.parse(inspect.cleandoc(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            texts[statement.target.id] = str(following.value.value) if is_text else ""  # type: ignore[attr-defined]
    return texts


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(reference(), encoding="utf-8")
