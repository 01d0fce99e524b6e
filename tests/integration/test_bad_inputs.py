"""What people bring and cannot be used, through the graph: one asset fails, names it in a line, and leaves nothing
half-written.

The assets run in this process, on the real store, tokenizer, Hub client and launcher. Settings are tested one by one in
config/test_loading, rows and files in data/test_layouts, test_readers, test_sources and test_hub_datasets.
"""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import pytest
from integration.graph import Graph
from projects import TestProject
from servers.hub import Hub
from tiers import every_third, tiered

from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE

GRAPH = ["dolly_raw", "cached_base_model", "tokenized_dataset", "lora_adapter"]
PUBLISHED = {"dolly_raw": "raw", "tokenized_dataset": "tokenized", "lora_adapter": "adapters"}
SAMPLE_LINES = SAMPLE.read_bytes()
Make = Callable[[TestProject, pytest.MonkeyPatch], None]


@dataclass
class Case:
    """One bad input.

    Attributes:
        fails: The asset that fails.
        facts: File, key, row, value or setting that its answer must name.
        make: Brings the bad input into a project, with the environment at hand.
        checks: Blocking checks that fail, of which the first answers; the artifact exists then, held back by them.
        overrides: Settings of the run.
    """

    fails: str
    facts: list[str]
    make: Make = lambda project, monkeypatch: None
    checks: tuple[str, ...] = ()
    overrides: list[str] = field(default_factory=list)


def rows(content: bytes, name: str = "rows.jsonl") -> Make:
    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
        (project.root / name).write_bytes(content)
        monkeypatch.setenv("FINETUNE_RAW_DATA", f"./{name}")

    return make


def source(url: str) -> Make:
    return lambda project, monkeypatch: monkeypatch.setenv("FINETUNE_RAW_DATA", url)


def edited(file: str, old: str, new: str) -> Make:
    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
        path = project.configs / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return make


def model(change: Callable[[Path], None]) -> Make:
    """The packaged model as a folder, changed."""

    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = Path(shutil.copytree(PACKAGED["demo-base"], project.root / "model"))
        change(folder)
        edited("experiments/demo.yaml", "base_model: demo-base", "base_model: ./model")(project, monkeypatch)

    return make


def set_in(file: str, **settings: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(tree | settings))

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5_000])


def without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def half_sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def an_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")


def without_end_token(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer_config.json").read_text())
    tree["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(tree))


def line(**row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def lines(count: int, **row: str) -> bytes:
    """Rows that differ, as rows do that are not repeats of one another."""
    return b"".join(line(**{name: f"{text} {number}" for name, text in row.items()}) for number in range(count))


def conversation(*roles: str, number: int = 0) -> bytes:
    return line(messages=[{"role": role, "content": f"says {role} {number}"} for role in roles])


def conversations(count: int, *roles: str) -> bytes:
    return b"".join(conversation(*roles, number=number) for number in range(count))


DEMO, RAW = "experiments/demo.yaml", "raw_data.yaml"
SYSTEM_REFUSED = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
SETTING = {
    "unknown setting": Case(
        "cached_base_model",
        ["demo.yaml", "training.learnin_rate", "'learning_rate'"],
        edited(DEMO, "learning_rate:", "learnin_rate:"),
    ),
    "override": Case("cached_base_model", ["training.seed", "1.5"], overrides=["training.seed=1.5"]),
    "raw data: unknown setting": Case(
        "dolly_raw", ["raw_data.yaml", "sorce", "'source'"], edited(RAW, "source: sample", "sorce: sample")
    ),
    "trusted code of another version": Case(
        "cached_base_model",
        ["model.trust_remote_code", "owner/x@" + "0" * 40, "packaged/demo-base@"],
        edited(DEMO, ": demo-base", ": demo-base\n  trust_remote_code: owner/x@" + "0" * 40),
    ),
}
ROWS = {
    "missing file": Case("dolly_raw", ["gone.jsonl"], source("./gone.jsonl")),
    "empty file": Case("dolly_raw", ["rows.jsonl"], rows(b"")),
    "broken last line": Case(
        "dolly_raw",
        ["1 of 11", "rows.jsonl:11"],
        rows(lines(10, instruction="i", response="r") + b'{"instr'),
        ("quarantine",),
    ),
    "wrong value": Case(
        "dolly_raw",
        ["1 of 11", "rows.jsonl:11", "'response'", '["x"]'],
        rows(lines(10, instruction="i", response="r") + line(instruction="i", response=["x"])),
        ("quarantine",),
    ),
    "other columns": Case(
        "dolly_raw",
        ["rows.jsonl:1", "'instruction'", "title", "body", "raw_data.yaml"],
        rows(line(title="q", body="a")),
        ("quarantine", "schema"),
    ),
    "mapped column that no row has": Case(
        "dolly_raw",
        ["raw_data.yaml", "columns.context", "'article'", "question, answer, passage"],
        lambda project, monkeypatch: (
            rows(line(question="q", answer="a", passage="p"))(project, monkeypatch),
            edited(RAW, "source: sample", "source: sample\ncolumns: {context: article}")(project, monkeypatch),
        )[0],
    ),
    "a row of 50 MB": Case(
        "dolly_raw",
        ["1 of 2", "rows.jsonl:1"],
        rows(line(instruction="i", response="x" * 50_000_000) + line(instruction="i", response="r")),
        ("quarantine",),
    ),
    "CSV with semicolons": Case("dolly_raw", ["rows.csv:1"], rows(b"instruction;response\na;b\n", "rows.csv")),
    "Hub dataset that is gated": Case("dolly_raw", ["owner/gated", "HF_TOKEN"], source("hf://datasets/owner/gated")),
}
MODEL = {
    "unknown packaged model": Case(
        "cached_base_model", ["demo_base", "'demo-base'"], edited(DEMO, ": demo-base", ": demo_base")
    ),
    "missing folder": Case("cached_base_model", ["gone"], edited(DEMO, ": demo-base", ": ./gone")),
    "folder without config": Case("cached_base_model", ["model", "config.json"], model(without("config.json"))),
    "folder without weights": Case(
        "cached_base_model", ["/model: ", "model.safetensors"], model(without("model.safetensors"))
    ),
    "folder without tokenizer": Case("cached_base_model", ["model", "tokenizer"], model(without("tokenizer.json"))),
    "pickled weights only": Case("cached_base_model", ["pytorch_model.bin", "safetensors"], model(pickled)),
    "an adapter": Case("cached_base_model", ["model", "adapter"], model(an_adapter)),
    "weights cut short": Case("cached_base_model", ["local/model", "model.safetensors"], model(truncated)),
    "missing shard": Case("cached_base_model", ["model-00002-of-00002.safetensors"], model(half_sharded)),
    "config that is no JSON": Case(
        "cached_base_model", ["config.json", "JSON"], model(with_text("config.json", "{oops"))
    ),
    "code of its own": Case(
        "cached_base_model",
        ["model.trust_remote_code", "local/model@"],
        model(set_in("config.json", model_type="new", auto_map={"AutoModelForCausalLM": "modeling_new.New"})),
    ),
    "gated model": Case("cached_base_model", ["owner/model", "HF_TOKEN"], edited(DEMO, ": demo-base", ": owner/model")),
}
DATASET = {
    "conversations where a prompt is used": Case(
        "tokenized_dataset",
        ["8 of 808", "data.max_refused_share", "0.005", "row 800 of dolly_raw", "chat_template"],
        rows(SAMPLE_LINES + conversation("user", "assistant", "user", "assistant") * 8),
        ("refused_rows",),
        ["data.max_refused_share=0.005"],
    ),
    "conversations alone where a prompt is used": Case(
        "tokenized_dataset",
        ["10 refused", "row 0 of dolly_raw"],
        rows(conversations(10, "user", "assistant", "user", "assistant")),
    ),
    "chat template that is not there": Case(
        "tokenized_dataset",
        ["data.prompt_template.chat_template"],
        overrides=["data.prompt_template.chat_template=true"],
    ),
    "chat template that refuses system turns": Case(
        "tokenized_dataset",
        ["row 0 of dolly_raw", "no system here"],
        lambda project, monkeypatch: (
            model(with_text("chat_template.jinja", SYSTEM_REFUSED))(project, monkeypatch),
            rows(conversations(10, "system", "user", "assistant"))(project, monkeypatch),
        )[1],
        overrides=["data.prompt_template.chat_template=true"],
    ),
    "chat template that is none": Case(
        "tokenized_dataset",
        ["chat template"],
        model(with_text("chat_template.jinja", "{% for m in messages %}")),
        overrides=["data.prompt_template.chat_template=true"],
    ),
    "tokenizer without an end token": Case(
        "tokenized_dataset", ["data.tokenization.add_eos_token"], model(without_end_token)
    ),
    "tokenizer that is damaged": Case("tokenized_dataset", ["tokenizer"], model(with_text("tokenizer.json", "{"))),
    "category that no row has": Case(
        "tokenized_dataset",
        ["data.categories", "'poems'", "closed_qa"],
        overrides=["data.categories=[poems]"],
    ),
    "cut-off beyond the model's positions": Case(
        "tokenized_dataset",
        ["data.tokenization.cutoff_len", "1000", "512"],
        overrides=["data.tokenization.cutoff_len=1000"],
    ),
    "cut-off before any answer": Case(
        "tokenized_dataset", ["cutoff_len"], overrides=["data.tokenization.cutoff_len=4"]
    ),
    "too few rows to hold any out": Case(
        "tokenized_dataset", ["validation"], rows(lines(3, instruction="Why", response="So"))
    ),
}
TRAINING = {
    "weights of another shape": Case(
        "lora_adapter",
        ["/model", "mlp.down_proj.weight", "[192, 512]", "[192, 640]"],
        model(set_in("config.json", intermediate_size=640)),
    ),
    "weights of more layers": Case(
        "lora_adapter",
        ["model.layers.2.", "num_hidden_layers 2", "config.json"],
        model(set_in("config.json", num_hidden_layers=2)),
    ),
    "a weight that is missing": Case("lora_adapter", ["model.layers.1.mlp.up_proj.weight"], model(without_a_weight)),
    "unknown architecture": Case("lora_adapter", ["brand_new"], model(set_in("config.json", model_type="brand_new"))),
    "target that is not in the model": Case(
        "lora_adapter",
        ["lora.target_modules", "w_nowhere"],
        edited(DEMO, "rank: 32", "rank: 32\n  target_modules: [w_nowhere]"),
    ),
}
ON_THE_HUB = {"Hub dataset that is gated", "gated model"}
CASES = {**SETTING, **ROWS, **MODEL, **DATASET, **TRAINING}


@pytest.fixture
def gated(hub: Hub) -> None:
    """A Hub with what the cases name."""
    hub.add("datasets/owner/gated", {"train.jsonl": SAMPLE_LINES}, gated=True)
    hub.add("owner/model", {}, gated=True)


def run(fails: str, overrides: list[str]) -> dg.ExecuteInProcessResult:
    """Materialize the asset that is to fail, and what it needs."""
    alone = fails in ("dolly_raw", "cached_base_model")
    return materialize([fails] if alone else GRAPH[: GRAPH.index(fails) + 1], overrides)


def materialize(selection: list[str], overrides: list[str]) -> dg.ExecuteInProcessResult:
    return Graph().run(selection, None if selection == ["dolly_raw"] else "demo", overrides).result


def answers(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """The description of each failure, by asset, and of each failed blocking check, by asset and check."""
    found = {}
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            user = event.step_failure_data.user_failure_data
            found[event.step_key or ""] = (user.description if user else None) or (error.message if error else "")
    for evaluation in result.get_asset_check_evaluations():
        if not evaluation.passed and evaluation.blocking:
            found[f"{evaluation.asset_key.to_user_string()}:{evaluation.check_name}"] = evaluation.description or ""
    return found


LOADED = {
    "weights of more layers",
    "weights of another shape",
    "a weight that is missing",
    "unknown architecture",
    "target that is not in the model",
}
"""Found only when a training loads them."""


@pytest.mark.parametrize("name", tiered(CASES, every_third(name for name in CASES if name not in LOADED)))
def test_bad_input_is_named_and_leaves_nothing(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, name: str
) -> None:
    case = CASES[name]
    if name in ON_THE_HUB:
        request.getfixturevalue("gated")
    case.make(project, monkeypatch)
    result = run(case.fails, case.overrides)
    assert not result.success
    found = answers(result)
    checks = [f"{case.fails}:{check}" for check in case.checks]
    assert {*found} == {case.fails, *checks}
    answer = found[checks[0] if checks else case.fails]
    for fact in case.facts:
        assert fact in answer
    assert "Traceback" not in answer
    assert len(answer) < 700, "short enough to be read"
    assert "\n" not in answer.strip(), answer
    for asset, kind in PUBLISHED.items():
        if GRAPH.index(asset) >= GRAPH.index(case.fails):
            assert bool(project.published(kind)) is (asset == case.fails and bool(case.checks))
    assert not project.leftovers()


def test_few_bad_rows_are_set_aside(project: TestProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 801 is below the default share: the rest is used, and the row is in the artifact with its line."""
    bad_row = {"instruction": "Who?", "response": ["x"]}
    rows(SAMPLE_LINES + line(**bad_row))(project, monkeypatch)
    assert run("dolly_raw", []).success
    (name,) = project.published("raw")
    folder = project.store.fetch(project.store.resolve("raw", name, "dolly_raw"))
    (bad,) = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    assert (bad["file"], bad["line"], json.loads(bad["text"])) == ("rows.jsonl", 801, bad_row)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel lets this process write no file beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("asset", "size"), [("dolly_raw", 10_000), ("cached_base_model", 1_000_000), ("tokenized_dataset", 40_000)]
)
def test_disk_full_leaves_nothing_half_written(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, asset: str, size: int
) -> None:
    if asset == "tokenized_dataset":
        assert materialize(["dolly_raw", "cached_base_model"], []).success
    with largest_file(size):
        result = materialize([asset], [])
    assert not result.success
    assert os.strerror(errno.EFBIG) in answers(result)[asset]
    assert not project.published(PUBLISHED.get(asset, "none"))
    assert not list(project.store_root.glob("base-models/**/manifest.json")) or asset == "tokenized_dataset"
    assert not project.leftovers_of_builds()
    assert run(asset, []).success, "once there is room, the same run succeeds"
