"""Settings that are made to take the reader down: one error each, and the other experiments still load."""

import random
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path

import pytest
from limited import run_limited
from projects import TestProject
from tiers import every_third, tiered

from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import experiment_names, load_experiment, load_raw_data_config, load_store_config
from finetune_assets.config.patterns import pattern_problem

DEEP = {
    "flow lists": "a: " + "[" * 20_000,
    "closed flow lists": "description: " + "[" * 5_000 + "]" * 5_000,
    "block lists": "description: " + "- " * 5_000 + "x",
    "block maps": "\n".join(" " * n + "a:" for n in range(2_000)),
    "flow maps": "description: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "merges": "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: *a{n - 1}}}" for n in range(1, 3_000)),
    "aliases": "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3_000)),
    "a file of 20 MB": "description: " + "x" * 20_000_000,
}


FILES = ("experiments/bad.yaml", "raw_data.yaml", "store.yaml", "sweeps/bad.yaml")
EVERY_CHANGE = {("store.yaml", name) for name in every_third(DEEP)}
SYSTEM = {*zip(cycle(FILES), DEEP, strict=False)}
"""Each text in one of the files; `make soak` has it in all of them."""


@pytest.mark.parametrize(
    ("file", "name"),
    [pytest.param(*case.values[0], marks=case.marks) for case in tiered(product(FILES, DEEP), EVERY_CHANGE, SYSTEM)],
)
def test_deep_settings_are_one_error(file: str, name: str, project: TestProject) -> None:
    (project.configs / file).parent.mkdir(exist_ok=True)
    (project.configs / file).write_text(DEEP[name])
    load: dict[str, Callable[[], object]] = {
        "experiments/bad.yaml": lambda: load_experiment(project.configs, "bad"),
        "raw_data.yaml": lambda: load_raw_data_config(project.configs),
        "store.yaml": lambda: load_store_config(project.configs),
        "sweeps/bad.yaml": lambda: load_experiment(project.configs, "bad.1"),
    }
    outcome = run_limited(load[file])
    outcome.check(("ConfigError",))
    assert file in outcome.text
    assert load_experiment(project.configs, "demo").name == "demo"
    assert "demo" in experiment_names(project.configs)


CATASTROPHIC = [
    "(a+)+$", "(.*)*x", "(.+.+)+x", "(a|ab)+$", ".*.*.*.*.*x", ".?" * 30 + "x", "(a?){30}a{30}", r"(\w+\.)*x",
    "((.{1,9}){1,9}){1,9}x", r"(.)\1*x", "(?:(?:a*)*)*", "x" * 2_000, "(" * 500 + ")" * 500, "[", "(?>a+)+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", tiered(CATASTROPHIC, every_third(CATASTROPHIC)))
def test_patterns_that_may_match_forever_are_refused(pattern: str, project: TestProject) -> None:
    assert pattern_problem(pattern)
    with pytest.raises(ConfigError, match=r"lora\.rank_pattern"):
        load_experiment(project.configs, "demo", [f"lora.rank_pattern.'{pattern}'=4"])


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", "layers.0.q_proj", r".*\.layers\.[0-3]\..*q_proj", "(q|k|v)_proj", r"layers\.\d+\.mlp", "a{30}"],
)
def test_patterns_of_modules_are_accepted(pattern: str) -> None:
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("data.tokenization.added_tokens", 20_000),
        pytest.param("data.tokenization.added_tokens", 9_000, marks=pytest.mark.system),
        ("lora.modules_to_save", 20_000),
    ],
)
def test_long_lists_are_one_error(key: str, count: int, project: TestProject) -> None:
    names = ", ".join(f"t{n}" for n in range(count))
    outcome = run_limited(lambda: load_experiment(project.configs, "demo", [f"{key}=[{names}, t0]"]))
    assert outcome.error == "ConfigError"
    assert key in outcome.text
    assert outcome.seconds < 15  # most of it is that of PyYAML and OmegaConf


SOURCES = [
    "s3://key:PASS@bucket/rows", "s3://PASS@bucket/rows", "S3://k:PASS@bucket", "s3://bucket/rows?sig=PASS",
    "hf://datasets/u:PASS@owner/name", "hf://u:PASS@datasets/owner/name", "https://u:PASS@host/rows.jsonl",
    "https://bucket.s3.amazonaws.com/rows.jsonl?X-Amz-Signature=PASS", "s3://k:P%40PASS@bucket/rows",
    "hf://datasets/hf_PASSPASSPASSPASSPASS@owner/name",
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_sources_with_credentials_are_refused(source: str, project: TestProject) -> None:
    path = project.configs / "raw_data.yaml"
    for text, given in ((f"source: '{source}'", None), (f"sources: {{a: {{source: '{source}'}}}}", None), ("", source)):
        path.write_text(text)
        with pytest.raises(ConfigError) as refused:
            load_raw_data_config(project.configs, given)
        assert "PASS" not in str(refused.value)
        assert ("FINETUNE_RAW_DATA" if given else "raw_data.yaml") in str(refused.value)
        assert "source" in str(refused.value)


PIECES = ["training:", "lora:", "  rank: ", "&a ", "*a", "<<: *a", "[", "]", "{", "}",
          "- ",
          "!!python/object:os.x ",
          "\n", "  ", "${oc.env:HOME}", "9" * 400, ".inf", "\x1b[2J", "\u202e", "0x",
          "'", '"', "? ", "| ", "> ", "%TAG",
          "---", "description: ", "\t", "é", "rank_pattern: {(a+)+: 1}", "null", "~", ": "]  # fmt: skip


@pytest.mark.parametrize("seed", tiered(range(50), every_third(range(20))))
def test_hostile_settings_are_one_line(seed: int, project: TestProject) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(PIECES, k=rng.choice([5, 30, 400]))) * rng.choice([1, 1, 20])
    (Path(project.configs) / "experiments" / "bad.yaml").write_text(text)
    outcome = run_limited(lambda: load_experiment(project.configs, "bad").name)
    outcome.check(("", "ConfigError"))
    assert outcome.error == "" or "bad.yaml" in outcome.text
