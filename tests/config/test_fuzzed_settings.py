"""Settings of every shape and type: whatever is written, a file loads or is one `ConfigError`."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from projects import all_configs

from finetune_assets.artifacts.kinds import RAW, STACKS
from finetune_assets.automation.settings_hash import SETTINGS
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.fingerprint import fingerprint, identity
from finetune_assets.config.loading import (
    dump,
    experiment_names,
    load_experiment,
    load_raw_data_config,
    load_resolved,
    load_store_config,
    load_sweep,
)
from finetune_assets.config.raw_data_schema import RawDataConfig
from finetune_assets.config.schema import ExperimentConfig, StoreConfig
from finetune_assets.config.typed_yaml import hints_of, required_type

CASES = 30
"""Number of cases of each kind; set it to 3,000 after a change of `typed_yaml.py`, which takes minutes."""
ODD = [
    *("", "~", "null", "true", "off", "no", "0017", "08", "1:30", "12:00:00", "1e-4", "1e999", "1_000", "0x1f", "0o17"),
    *(".nan", "nan", "-.inf", "inf", "9" * 30, "9" * 5_000, "-1", "0", "1.5", "8.0", "2024-01-01", "1.", ".5", "-0"),
    *("'text'", "für", "漢字 😀", '"\\ud800"', '"\\0"', '"\\x85\\u2028\\ufeff\\r\\t\\n\\e"', "'  '", "''", "'null'"),
    *("!!binary aGk=", "!!python/object:os.system x", "!foo bar", "!!set {a, b}", "!!timestamp 2024-01-01", "! x"),
    *("!!str 12", "!!int '3'", "!!float x", "!!null x", "!!omap [a: 1]", "!!map [a]", "!!seq {a: 1}"),
    *("[1, [2, {a: null}]]", "{0: {1: 2}}", "{null: 1, true: 2, 1.5: 3}", "{? [a] : b}", "[{a: 1}, 2]", "[]", "{}"),
    *("&x [*x]", "&x {a: *x}", "&x {<<: *x}", "{<<: {rank: 1}}", "{<<: 5}", "*nowhere", "[&a b, *a]", "{a: 1, a: 2}"),
    *(
        "${oc.env:HOME}",
        "'${'",
        "???",
        "[???]",
        "[",
        "}",
        "'",
        "a" * 3_000,
        "a: b: c",
        "- a",
        "@x",
        "%x",
        "`x`",
        "a #b",
    ),
    *("[" * 300 + "]" * 300, "{a: " * 300 + "}" * 300, "../../x", "/", "a.b", "a..", "(", "x{99999999999}", "(" * 200),
]
"""Values as YAML text."""


def value(hint: Any, rng: random.Random, oddness: float) -> str:
    """A value as YAML text: of the type, or an odd one."""
    if rng.random() < oddness:
        return rng.choice(ODD)
    required, optional = required_type(hint)
    if optional and rng.random() < 0.2:
        return "null"
    if is_dataclass(required):
        hints = hints_of(required)  # type: ignore[arg-type]
        names = rng.sample([*hints], rng.randint(0, min(4, len(hints))))
        return "{" + ", ".join(f"{name}: {value(hints[name], rng, oddness)}" for name in names) + "}"
    if get_origin(required) is list:
        return "[" + ", ".join(value(get_args(required)[0], rng, oddness) for _ in range(rng.randint(0, 3))) + "]"
    if get_origin(required) is dict:
        names = rng.sample(["q_proj", "a.b", "'.*'", "on", "007", "demo", "llama-7b-int8", "A"], rng.randint(0, 3))
        return "{" + ", ".join(f"{name}: {value(get_args(required)[1], rng, oddness)}" for name in names) + "}"
    if get_origin(required) is Literal:
        return str(rng.choice(get_args(required)))
    plain = {int: ["1", "4", "16"], float: ["0.5", "1e-4", "2"], bool: ["true", "off"]}
    return rng.choice(plain.get(required, ["text", "0123", "1e10", "[q_proj]", "true"]))


def document(schema: type, rng: random.Random, first: str = "") -> str:
    """A file's text, sometimes with a character that was replaced, removed or added."""
    oddness, hints = rng.choice([0.0, 0.02, 0.1, 0.4]), hints_of(schema)
    names = rng.sample([*hints], rng.randint(0, len(hints)))
    text = first + "".join(f"{name}: {value(hints[name], rng, oddness)}\n" for name in names if f"{name}:" not in first)
    if text and rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", "\t", "\n", ":", " #", "&", "\x00", "é", "["]) + text[at + 1 :]
    return text


def paths(schema: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted path and type."""
    for name, hint in hints_of(schema).items():
        yield f"{before}{name}", hint
        required, _ = required_type(hint)
        if is_dataclass(required):
            yield from paths(required, f"{before}{name}.")


PATHS = [*paths(ExperimentConfig), ("lora.rank_pattern.a.b", int), ("launcher.environment.A", str), ("lora.rnk", int)]


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return all_configs(tmp_path)


def loaded(load: Callable[[], Any]) -> Any:
    """What `load` returns; None if it refuses with one line."""
    try:
        return load()
    except ConfigError as e:
        problem = str(e)
    assert "\n" not in problem
    assert len(problem) < 10_000
    return None


def compute_all(experiment: Any, folder: Path) -> None:
    """Everything that is computed from settings alone."""
    config = experiment.config
    file = folder / "resolved.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load_resolved(file) == config
    for asset, read in SETTINGS.items():
        if asset != "stacked_adapter":
            read(experiment, "salt")
    if config.stack:
        STACKS.fingerprint(config, champions=[], cached_base_model="base")
    assert config.launcher.node_range[0] >= 1
    assert config.launcher.seconds is None or config.launcher.seconds >= 0
    assert json.loads(json.dumps(asdict(config), allow_nan=False)) == asdict(config)


@pytest.mark.parametrize("seed", range(2))
def test_experiments(configs: Path, seed: int) -> None:
    rng, kept = random.Random(seed), 0
    file = configs / "experiments" / "fuzzed.yaml"
    for _ in range(CASES):
        file.write_text(document(ExperimentConfig, rng, "model: {base_model: demo-base}\n"), encoding="utf-8")
        if experiment := loaded(lambda: load_experiment(configs, "fuzzed")):
            compute_all(experiment, configs)
            kept += 1
    assert kept, "some are valid"
    assert {"demo", "fuzzed"} <= {*experiment_names(configs)}
    compute_all(load_experiment(configs, "demo"), configs)


@pytest.mark.system
def test_overrides(configs: Path) -> None:
    rng = random.Random(2)
    for _ in range(2 * CASES):
        name, hint = rng.choice(PATHS)
        override = f"{name}={value(hint, rng, 0.5)}"
        if experiment := loaded(lambda override=override: load_experiment(configs, "demo", [override])):
            compute_all(experiment, configs)


def test_sweeps(configs: Path) -> None:
    rng = random.Random(3)
    for _ in range(2 * CASES):
        chosen = rng.sample(PATHS, rng.randint(0, 3))
        grid = ", ".join(
            f"{name}: [{', '.join(value(hint, rng, 0.2) for _ in range(rng.randint(0, 3)))}]" for name, hint in chosen
        )
        lines = [f"experiment: {rng.choice(['demo', 'demo', 'gone', 'fuzzed', *ODD])}", f"grid: {{{grid}}}"]
        lines += [f"{name}: {rng.choice(['1', '3', *ODD])}" for name in ("sample", "seed") if rng.random() < 0.3]
        (configs / "sweeps" / "fuzzed.yaml").write_text("\n".join(lines), encoding="utf-8")
        points = loaded(lambda: load_sweep(configs, "fuzzed")) or []
        known = experiment_names(configs)
        assert "demo" in known
        assert "demo-ranks.rank-4" in known
        assert {point.name for point in points} <= {*known}
        for point in points[:2]:
            if experiment := loaded(lambda point=point: load_experiment(configs, point.name)):
                compute_all(experiment, configs)


def test_raw_data_and_store(configs: Path) -> None:
    rng = random.Random(4)
    for _ in range(CASES):
        (configs / "raw_data.yaml").write_text(document(RawDataConfig, rng), encoding="utf-8")
        (configs / "store.yaml").write_text(document(StoreConfig, rng), encoding="utf-8")
        if raw := loaded(lambda: load_raw_data_config(configs)):
            RAW.fingerprint(raw, content="content")
            fingerprint(columns=identity(raw.columns), checks=asdict(raw.checks), arrivals=asdict(raw.arrivals))
        if store := loaded(lambda: load_store_config(configs)):
            json.dumps(asdict(store), allow_nan=False)
    compute_all(load_experiment(configs, "demo"), configs)
