"""Everything that people bring and that cannot be used: each has one clear answer, and leaves nothing half-written.

The assets run in this process, on the real store, tokenizer, Hub client and launcher.
"""

import gzip
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from projects import TestProject
from servers.hub import Hub

from finetune_assets.data.sources import SAMPLE
from finetune_assets.definitions import defs
from finetune_assets.store.base_models import PACKAGED

GRAPH = ["dolly_raw", "cached_base_model", "tokenized_dataset", "lora_adapter"]
PUBLISHED = {"dolly_raw": "raw", "tokenized_dataset": "tokenized", "lora_adapter": "adapters"}
SAMPLE_LINES = SAMPLE.read_bytes()


@dataclass
class Case:
    """One bad input.

    Attributes:
        fails: The asset that fails.
        words: What its answer must say.
        make: Brings the bad input into a project, with the environment and the Hub at hand.
        published: Whether the asset's artifact exists all the same, held back by its check.
    """

    fails: str
    words: list[str]
    make: Callable[[TestProject, pytest.MonkeyPatch, Hub], None]
    published: bool = False
    overrides: list[str] = field(default_factory=list)


def rows(content: bytes, name: str = "rows.jsonl") -> Callable[[TestProject, pytest.MonkeyPatch, Hub], None]:
    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
        (project.root / name).write_bytes(content)
        monkeypatch.setenv("FINETUNE_RAW_DATA", f"./{name}")

    return make


def source(url: str) -> Callable[[TestProject, pytest.MonkeyPatch, Hub], None]:
    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
        hub.add("datasets/owner/rows", {"train.jsonl": SAMPLE_LINES})
        hub.add("datasets/owner/gated", {"train.jsonl": SAMPLE_LINES}, gated=True)
        monkeypatch.setenv("FINETUNE_RAW_DATA", url)

    return make


def edited(file: str, old: str, new: str) -> Callable[[TestProject, pytest.MonkeyPatch, Hub], None]:
    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
        path = project.configs / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return make


def model(change: Callable[[Path], None]) -> Callable[[TestProject, pytest.MonkeyPatch, Hub], None]:
    """The packaged model as a folder, changed."""

    def make(project: TestProject, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
        folder = Path(shutil.copytree(PACKAGED["demo-base"], project.root / "model"))
        change(folder)
        edited("experiments/demo.yaml", "base_model: demo-base", "base_model: ./model")(project, monkeypatch, hub)

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


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"instruction": ["i"] * 100, "response": ["r"] * 100}), sink)
    return sink.getvalue().to_pybytes()


DEMO, RAW = "experiments/demo.yaml", "raw_data.yaml"
SYSTEM_REFUSED = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
SETTING = {
    "unknown setting": Case(
        "cached_base_model",
        ["demo.yaml", "training.learnin_rate", "did you mean 'learning_rate'"],
        edited(DEMO, "learning_rate:", "learnin_rate:"),
    ),
    "wrong type": Case("cached_base_model", ["training.epochs", "many"], edited(DEMO, "epochs: 15", "epochs: many")),
    "not one of the choices": Case(
        "cached_base_model",
        ["training.precision", "'fp23'", "fp32"],
        edited(DEMO, "precision: fp32", "precision: fp23"),
    ),
    "impossible together": Case(
        "cached_base_model",
        ["training.precision", "full_bf16", "nf4"],
        edited(DEMO, "dtype: float32", "quantization: nf4"),
        overrides=["training.precision=full_bf16"],
    ),
    "broken YAML": Case("cached_base_model", ["demo.yaml", "line", "YAML"], edited(DEMO, "model:\n", "model\n")),
    "setting from the environment": Case(
        "cached_base_model",
        ["description", "must be literal"],
        edited(DEMO, "A tiny base", "${oc.env:HOME} A tiny base"),
    ),
    "override without a value": Case(
        "cached_base_model", ["override 'training'", "key=value"], rows(SAMPLE_LINES), overrides=["training"]
    ),
    "unknown placeholder": Case(
        "cached_base_model",
        ["prompt_no_input", "unknown placeholder '{instructions}'"],
        edited(DEMO, "{instruction}\\n### Response: ", "{instructions}\\n### Response: "),
    ),
    "raw data: unknown setting": Case(
        "dolly_raw", ["raw_data.yaml", "sorce", "did you mean 'source'"], edited(RAW, "source: sample", "sorce: sample")
    ),
    "raw data: share out of range": Case(
        "dolly_raw",
        ["max_quarantine_share", "1.5"],
        edited(RAW, "max_quarantine_share: 0.01", "max_quarantine_share: 1.5"),
    ),
    "raw data: one column twice": Case(
        "dolly_raw",
        ["columns.instruction", "'text' is given twice"],
        edited(RAW, "source: sample", "columns: {instruction: text, response: text}"),
    ),
    "blank added token": Case(
        "cached_base_model",
        ["data.tokenization.added_tokens", "' '"],
        rows(SAMPLE_LINES),
        overrides=["data.tokenization.added_tokens=[' ']"],
    ),
    "trusted code without a commit": Case(
        "cached_base_model",
        ["model.trust_remote_code", "'true'", "owner/name@commit"],
        rows(SAMPLE_LINES),
        overrides=["model.trust_remote_code='true'"],
    ),
    "trusted code of another version": Case(
        "cached_base_model",
        ["model.trust_remote_code", "owner/x@" + "0" * 40, "packaged/demo-base@"],
        rows(SAMPLE_LINES),
        overrides=["model.trust_remote_code=owner/x@" + "0" * 40],
    ),
}
ROWS = {
    "missing file": Case("dolly_raw", ["gone.jsonl", "does not exist"], source("./gone.jsonl")),
    "unknown format": Case("dolly_raw", ["rows.xlsx", "end in .jsonl"], rows(b"x", "rows.xlsx")),
    "empty file": Case("dolly_raw", ["rows.jsonl", "no rows"], rows(b"")),
    "blank lines only": Case("dolly_raw", ["rows.jsonl", "no rows"], rows(b"\n \n")),
    "broken last line": Case(
        "dolly_raw",
        ["1 of 11 rows (9.09%)", "rows.jsonl:11", "not JSON"],
        rows(lines(10, instruction="i", response="r") + b'{"instr'),
        True,
    ),
    "not an object": Case("dolly_raw", ["rows.jsonl:1", "expected a JSON object, found 3"], rows(b"3\n"), True),
    "other columns": Case(
        "dolly_raw",
        ["rows.jsonl:1", "'instruction' is missing; found question, answer", "raw_data.yaml: columns"],
        rows(line(question="q", answer="a")),
        True,
    ),
    "misspelt column": Case(
        "dolly_raw", ["'respones' would be lost", "'response'"], rows(line(instruction="i", respones="r")), True
    ),
    "blank response": Case("dolly_raw", ["'response' is blank"], rows(line(instruction="i", response=" ")), True),
    "response that is no text": Case(
        "dolly_raw", ["'response' must be text, found [1]"], rows(line(instruction="i", response=[1])), True
    ),
    "invalid UTF-8": Case(
        "dolly_raw", ["rows.jsonl:1", "not UTF-8 at byte 17"], rows(b'{"instruction": "\xff", "response": "r"}\n'), True
    ),
    "half a surrogate pair": Case(
        "dolly_raw", ["'instruction' is not UTF-8, or holds half"], rows(line(instruction="\ud800", response="r")), True
    ),
    "unknown role": Case("dolly_raw", ['turn 2: unknown role "wizard"'], rows(conversation("user", "wizard")), True),
    "no assistant turn": Case("dolly_raw", ["no assistant turn"], rows(conversation("system", "user")), True),
    "system turn in the middle": Case(
        "dolly_raw", ["turn 3 is a system turn"], rows(conversation("user", "assistant", "system")), True
    ),
    "tool calls": Case(
        "dolly_raw",
        ["turn 1: 'tool_calls' would be lost"],
        rows(line(messages=[{"role": "assistant", "content": "x", "tool_calls": [1]}])),
        True,
    ),
    "a row of 50 MB": Case(
        "dolly_raw",
        ["rows.jsonl:1", "bytes in one row"],
        rows(line(instruction="i", response="x" * 50_000_000) + line(instruction="i", response="r")),
        True,
    ),
    "UTF-16": Case("dolly_raw", ["rows.jsonl", "UTF-16"], rows('{"instruction": "i"}'.encode("utf-16"))),
    "compressed": Case("dolly_raw", ["rows.jsonl", "gzip", "unpack"], rows(gzip.compress(SAMPLE_LINES))),
    "array cut short": Case(
        "dolly_raw", ["rows.json:2", "not a JSON array", "nothing of this file"], rows(b'[{"a": 1},\n{"a"', "rows.json")
    ),
    "one object over many lines": Case(
        "dolly_raw", ["rows.json", "neither an array of rows"], rows(b'{\n"instruction": "i"\n}', "rows.json")
    ),
    "CSV with a quote that never closes": Case(
        "dolly_raw", ["rows.csv:2", "never closed"], rows(b'instruction,response\na,"b\nc,d\n', "rows.csv")
    ),
    "CSV with a stray quote": Case(
        "dolly_raw", ["rows.csv:2", "not CSV"], rows(b'instruction,response\n"5" disk",b\n', "rows.csv"), True
    ),
    "CSV with semicolons": Case(
        "dolly_raw", ["rows.csv:1", "separate the columns by commas"], rows(b"instruction;response\na;b\n", "rows.csv")
    ),
    "CSV with a column too many": Case(
        "dolly_raw",
        ["rows.csv:2", "3 fields where the header has 2"],
        rows(b"instruction,response\na,b,c\n", "rows.csv"),
        True,
    ),
    "Parquet cut short": Case("dolly_raw", ["rows.parquet", "cut short"], rows(parquet()[:-50], "rows.parquet")),
    "Parquet in name only": Case("dolly_raw", ["rows.parquet", "not a Parquet file"], rows(b"a,b\n", "rows.parquet")),
    "Hub dataset that is not there": Case(
        "dolly_raw", ["owner/gone", "not on the Hub"], source("hf://datasets/owner/gone")
    ),
    "Hub dataset that is gated": Case(
        "dolly_raw", ["owner/gated", "gated", "HF_TOKEN"], source("hf://datasets/owner/gated")
    ),
    "Hub dataset at no such revision": Case(
        "dolly_raw", ["'hf://datasets/owner/rows@v9'", "no such branch"], source("hf://datasets/owner/rows@v9")
    ),
    "Hub address of another kind": Case("dolly_raw", ["must be hf://datasets/owner/name"], source("hf://owner/rows")),
}
MODEL = {
    "unknown packaged model": Case(
        "cached_base_model", ["demo_base", "did you mean 'demo-base'"], edited(DEMO, ": demo-base", ": demo_base")
    ),
    "missing folder": Case("cached_base_model", ["does not exist"], edited(DEMO, ": demo-base", ": ./gone")),
    "folder without config": Case("cached_base_model", ["no config.json"], model(without("config.json"))),
    "folder without weights": Case("cached_base_model", ["no weights"], model(without("model.safetensors"))),
    "folder without tokenizer": Case("cached_base_model", ["no tokenizer"], model(without("tokenizer.json"))),
    "pickled weights only": Case(
        "cached_base_model", ["only pickled weights (pytorch_model.bin)", "safetensors"], model(pickled)
    ),
    "an adapter": Case("cached_base_model", ["an adapter; name the base model"], model(an_adapter)),
    "weights cut short": Case("cached_base_model", ["model.safetensors is damaged"], model(truncated)),
    "missing shard": Case(
        "cached_base_model", ["names model-00002-of-00002.safetensors, which is missing"], model(half_sharded)
    ),
    "config that is no JSON": Case(
        "cached_base_model", ["config.json is not JSON"], model(with_text("config.json", "{oops"))
    ),
    "code of its own": Case(
        "cached_base_model",
        ["needs Python code of its own", "set model.trust_remote_code to local/model@"],
        model(set_in("config.json", model_type="new", auto_map={"AutoModelForCausalLM": "modeling_new.New"})),
    ),
    "gated model": Case(
        "cached_base_model",
        ["owner/model", "gated", "HF_TOKEN"],
        lambda project, monkeypatch, hub: (
            hub.add("owner/model", {}, gated=True),
            edited(DEMO, ": demo-base", ": owner/model")(project, monkeypatch, hub),
        )[1],
    ),
}
DATASET = {
    "conversations where a prompt is used": Case(
        "tokenized_dataset",
        ["8 of 808 rows", "data.max_refused_share is 0.005", "row 800 of dolly_raw", "chat_template to true"],
        rows(SAMPLE_LINES + conversation("user", "assistant", "user", "assistant") * 8),
        True,
        ["data.max_refused_share=0.005"],
    ),
    "conversations alone where a prompt is used": Case(
        "tokenized_dataset",
        ["nothing to train on", "10 refused by the template (row 0 of dolly_raw"],
        rows(conversations(10, "user", "assistant", "user", "assistant")),
    ),
    "chat template that is not there": Case(
        "tokenized_dataset",
        ["has no chat template", "data.prompt_template.chat_template is true"],
        rows(SAMPLE_LINES),
        overrides=["data.prompt_template.chat_template=true"],
    ),
    "chat template that refuses system turns": Case(
        "tokenized_dataset",
        ["nothing to train on", "no system here"],
        lambda project, monkeypatch, hub: (
            model(with_text("chat_template.jinja", SYSTEM_REFUSED))(project, monkeypatch, hub),
            rows(conversations(10, "system", "user", "assistant"))(project, monkeypatch, hub),
        )[1],
        overrides=["data.prompt_template.chat_template=true"],
    ),
    "chat template that is none": Case(
        "tokenized_dataset",
        ["its chat template is no template"],
        model(with_text("chat_template.jinja", "{% for m in messages %}")),
        overrides=["data.prompt_template.chat_template=true"],
    ),
    "tokenizer without an end token": Case(
        "tokenized_dataset",
        ["has no end-of-sequence token", "data.tokenization.add_eos_token to false"],
        model(without_end_token),
    ),
    "tokenizer that is damaged": Case(
        "tokenized_dataset", ["no tokenizer that loads"], model(with_text("tokenizer.json", "{"))
    ),
    "category that no row has": Case(
        "tokenized_dataset",
        ["data.categories", "'poems'", "closed_qa"],
        rows(SAMPLE_LINES),
        overrides=["data.categories=[poems]"],
    ),
    "cut-off beyond the model's positions": Case(
        "tokenized_dataset",
        ["data.tokenization.cutoff_len", "1000", "512"],
        rows(SAMPLE_LINES),
        overrides=["data.tokenization.cutoff_len=1000"],
    ),
    "cut-off before any answer": Case(
        "tokenized_dataset",
        ["nothing to train on", "cutoff_len"],
        rows(SAMPLE_LINES),
        overrides=["data.tokenization.cutoff_len=4"],
    ),
    "too few rows to hold any out": Case(
        "tokenized_dataset", ["no validation example"], rows(lines(3, instruction="Why", response="So"))
    ),
}
TRAINING = {
    "weights of another shape": Case(
        "lora_adapter",
        ["/model does not fit", "mlp.down_proj.weight is [192, 512] in its files", "[192, 640]"],
        model(set_in("config.json", intermediate_size=640)),
    ),
    "weights of more layers": Case(
        "lora_adapter",
        ["weight model.layers.2.", "num_hidden_layers 2", "config.json that belongs"],
        model(set_in("config.json", num_hidden_layers=2)),
    ),
    "a weight that is missing": Case(
        "lora_adapter", ["lack the weight model.layers.1.mlp.up_proj.weight"], model(without_a_weight)
    ),
    "architecture that nobody knows": Case(
        "lora_adapter", ["no architecture 'brand_new'"], model(set_in("config.json", model_type="brand_new"))
    ),
    "target that is not in the model": Case(
        "lora_adapter",
        ["lora.target_modules", "w_nowhere"],
        edited(DEMO, "rank: 32", "rank: 32\n  target_modules: [w_nowhere]"),
    ),
}
CASES = {**SETTING, **ROWS, **MODEL, **DATASET, **TRAINING}


def test_there_are_at_least_forty() -> None:
    assert len(CASES) >= 40


def run(fails: str, overrides: list[str]) -> dg.ExecuteInProcessResult:
    """Materialize the graph up to the asset that is to fail."""
    return materialize(GRAPH[: GRAPH.index(fails) + 1], overrides)


def materialize(selection: list[str], overrides: list[str]) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [asset for asset in defs.assets or [] if isinstance(asset, dg.AssetsDefinition)],
        resources=dict(defs.resources or {}),
        selection=selection,
        partition_key=None if selection == ["dolly_raw"] else "demo",
        raise_on_error=False,
        run_config={"resources": {"project": {"config": {"overrides": overrides}}}},
    )


def told(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """What each asset that failed by itself says: the description of its failure, or of its failed check."""
    answers = {}
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            user = event.step_failure_data.user_failure_data
            answers[event.step_key or ""] = (user.description if user else None) or (error.message if error else "")
    for evaluation in result.get_asset_check_evaluations():
        if not evaluation.passed:
            answers[evaluation.asset_key.to_user_string()] = evaluation.description or ""
    return answers


@pytest.mark.parametrize("name", CASES)
def test_bad_input_has_one_clear_answer(
    project: TestProject, monkeypatch: pytest.MonkeyPatch, hub: Hub, name: str
) -> None:
    case = CASES[name]
    case.make(project, monkeypatch, hub)
    result = run(case.fails, case.overrides)
    assert not result.success
    answers = told(result)
    assert case.fails in answers, answers
    answer = answers[case.fails]
    for word in case.words:
        assert word in answer, answer
    assert "Traceback" not in answer
    assert len(answer) < 700, "short enough to be read"
    assert "\n" not in answer.strip(), answer
    for asset, kind in PUBLISHED.items():
        if GRAPH.index(asset) >= GRAPH.index(case.fails):
            assert bool(project.published(kind)) is (asset == case.fails and case.published)
    assert not project.leftovers()


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
        assert run("cached_base_model", []).success
    with largest_file(size):
        result = materialize([asset], [])
    assert not result.success
    answer = told(result)[asset]
    assert "File too large" in answer
    assert "space left" in answer
    assert not project.published(PUBLISHED.get(asset, "none"))
    assert not list(project.store_root.glob("base-models/**/manifest.json")) or asset == "tokenized_dataset"
    assert not project.leftovers_of_builds()
    assert run(asset, []).success, "once there is room, the same run succeeds"
