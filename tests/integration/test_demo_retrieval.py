"""The proof of docs/retrieval.md: an adapter that was trained with passages answers about towns that it never read."""

import re
from pathlib import Path

import commands
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from integration.graph import Graph
from projects import TestProject

from finetune_assets.artifacts.layout import CARD, ROWS
from finetune_assets.config.fingerprint import identity
from finetune_assets.config.loading import load_experiment
from finetune_assets.config.retrieval_validation import MODES
from finetune_assets.evaluation.files import read_evaluation
from finetune_assets.evaluation.gate import paired_gain
from finetune_assets.sample.towns import new_towns
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.names import SAMPLE_TOWNS

READER, CONTROL = "demo-retrieval", "demo-retrieval-control"
FEW_ROWS, STEPS = 300, 40
ASSETS = (
    *("cached_base_model", "tokenized_dataset", "training_plan"),
    *("lora_adapter", "adapter_evaluation", "champion_adapter"),
)


def test_the_control_differs_in_nothing_but_its_training_contexts(project: TestProject) -> None:
    reader, control = (load_experiment(project.configs, name).config for name in (READER, CONTROL))
    assert control.data.retrieval
    assert reader.data.retrieval
    assert (reader.data.retrieval.closed_book, control.data.retrieval.closed_book) == (False, True)
    control.data.retrieval.closed_book = False
    assert identity(reader) == identity(control)


@pytest.mark.soak
@pytest.mark.system
def test_what_was_trained_with_passages_has_the_lower_loss(
    project: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof in small: a tenth of the rows, and few steps."""
    for name in (READER, CONTROL):
        settings = yaml.safe_load((project.configs / "experiments" / f"{name}.yaml").read_text())
        settings["data"] |= {"num_samples": FEW_ROWS}
        settings["training"] |= {"max_steps": STEPS, "macro_batch_size": 8, "micro_batch_size": 8}
        settings["evaluation"] |= {"generated_rows": 0}
        project.write_experiment(name, yaml.safe_dump(settings))
    folders = both_evaluated(project, graph, monkeypatch)
    assert read_evaluation(folders[READER])["modes"].keys() == {*MODES}
    assert_control_is_worse(folders)


@pytest.mark.minutes
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_an_adapter_reads_about_towns_that_nothing_was_trained_on(
    project: TestProject,
    graph: Graph,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folders = both_evaluated(project, graph, monkeypatch)
    reader, control = (read_evaluation(folders[name]) for name in (READER, CONTROL))
    modes = reader["modes"]
    assert all(reader["unseen_passages"][mode]["rows"] == result["rows"] for mode, result in modes.items())
    scores = {mode: result["contenders"]["challenger"]["exact_match"] for mode, result in modes.items()}
    assert scores["closed_book"] <= 0.25, "one of 8 to 16 values, by chance"
    assert scores["golden"] >= 0.7
    assert scores["retrieved"] >= 0.7
    worse = control["modes"]["retrieved"]["contenders"]["challenger"]
    assert worse["exact_match"] < scores["retrieved"]
    assert_control_is_worse(folders)

    sample = reader["samples"][0]
    question = re.search(r"### Instruction: (.*)\n", sample["prompt"])[1]  # type: ignore[index]
    code, _, err = commands.run(capsys, "adapter", "fetch", READER, str(tmp_path / "adapter"), "--with-index")
    assert code == 0, err
    assert commands.run(capsys, "adapter", "verify", str(tmp_path / "adapter"))[0] == 0
    answer, *sources = run_card(tmp_path / "adapter", question, monkeypatch, capsys)
    assert answer.startswith(sample["challenger"].strip())
    (town,) = {*re.findall(r"\w+", question)} & {*new_towns().facts}
    assert any(town in source for source in sources)


def both_evaluated(project: TestProject, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Index, train and evaluate; return the folders of the evaluations by experiment."""
    monkeypatch.setenv("FINETUNE_RAW_DATA", SAMPLE_TOWNS)
    assert graph.run("dolly_raw", None).success
    assert graph.run("retrieval_index", READER).success
    return {name: evaluated(project, graph, name) for name in (READER, CONTROL)}


def assert_control_is_worse(folders: dict[str, Path]) -> None:
    """Assert that, in the mode that serves, the control's loss is higher than noise explains."""
    losses, tokens = zip(*(losses_and_tokens(folders[name]) for name in (CONTROL, READER)), strict=True)
    assert np.array_equal(*tokens), "the same rows"
    assert paired_gain(*losses, tokens[0], confidence=0.95).lower > 0, "beyond noise"


def evaluated(project: TestProject, graph: Graph, experiment: str) -> Path:
    """Train and evaluate an experiment; return the folder of its evaluation."""
    known = {*project.published("evaluations")}
    done = graph.run(ASSETS, experiment)
    assert done.success, done.log
    (name,) = {*project.published("evaluations")} - known
    return project.store.fetch(project.store.resolve("evaluations", name, "adapter_evaluation"))


def losses_and_tokens(evaluation: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(evaluation / ROWS)
    return table["challenger"].to_numpy(), table["tokens"].to_numpy()


def run_card(
    adapter: Path, question: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """Run the model card's lines in the adapter's folder, and return the lines that they print."""
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / CARD).read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace("What ...?", question)
    code = re.sub(r"^base = .*$", f"base = {str(PACKAGED['demo-base'])!r}", code, flags=re.MULTILINE)
    monkeypatch.chdir(adapter)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out.strip().splitlines()
