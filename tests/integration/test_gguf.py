"""The demo through its exported files answers as the evaluation did; a GGUF file as base model, in the graph."""

import json
import shutil
from pathlib import Path

import pytest
from integration.graph import Graph
from merging.test_modelfile import ollama
from projects import TestProject
from servers import llama_cpp

from finetune_assets.artifacts.kinds import BASE_MODELS, EVALUATIONS, MERGED, TOKENIZED
from finetune_assets.cli.plan import shape_of
from finetune_assets.config.loading import load_experiment
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.files import read_evaluation
from finetune_assets.evaluation.generation import readable
from finetune_assets.evaluation.metrics.exact_match import exact_match
from finetune_assets.evaluation.rows import held_out
from finetune_assets.merging.gguf import export
from finetune_assets.merging.modelfile import modelfile, template_of
from finetune_assets.resources.project import Project
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.store.artifacts import open_store
from finetune_assets.store.errors import ArtifactMissing, ForeignContent

Q8_ROWS = 2
"""Rows of 51 whose answer may be another one in 8 bits."""


@pytest.mark.system
@pytest.mark.soak
@pytest.mark.minutes
def test_the_demo_answers_as_in_its_evaluation(project: TestProject, graph: Graph) -> None:
    settings = (project.configs / "experiments" / "demo.yaml").read_text()
    project.write_experiment("demo", settings + "merge: {gguf: [bf16, q8_0]}\n")
    run = graph.run(["*champion_adapter", "merged_model"])
    assert run.success, run.log
    store = project.store
    (merged,), (tokenized,), (evaluated,) = (
        project.published(kind.folder) for kind in (MERGED, TOKENIZED, EVALUATIONS)
    )
    folder = store.fetch(store.resolve(MERGED.folder, merged, "merged_model"))
    evaluation = read_evaluation(store.fetch(store.resolve(EVALUATIONS.folder, evaluated, "adapter_evaluation")))
    config = load_experiment(project.configs, "demo").config
    rows = held_out(store.fetch(store.resolve(TOKENIZED.folder, tokenized, "tokenized_dataset")), "gate", config.data)
    tokenizer = load_tokenizer(str(folder))
    expected = [readable(tokenizer, ids) for ids in rows.answers]
    template = template_of(config, tokenizer)
    assert (folder / "gguf" / "Modelfile").read_text() == modelfile("model-bf16.gguf", template, ["</s>"])
    measured = json.loads((folder / "merge.json").read_text())["gguf"]
    known = evaluation["contenders"]["challenger"]["exact_match"]
    assert evaluation["generated_rows"] == len(expected)
    for kind, tolerance in (("bf16", 0), ("q8_0", Q8_ROWS)):
        with llama_cpp.running(folder / "gguf" / f"model-{kind}.gguf") as server:
            matches = 0
            for ids, wanted in zip(rows.prompts, expected, strict=True):
                text = tokenizer.decode(ids[1:])
                assert server.tokens(text) == ids
                matches += exact_match(server.answer(text, config.evaluation.max_new_tokens).strip(), wanted)
        print(f"{kind}: exact match {matches} of {len(expected)}, evaluation {known:.1%}, logits {measured[kind]}")
        assert abs(matches - known * len(expected)) <= tolerance + 1e-6
    plain = next(text for ids in rows.prompts if "### Input:" not in (text := tokenizer.decode(ids[1:])))
    question = plain.removeprefix("### Instruction: ").removesuffix("\n### Response:")
    assert ollama(template, [{"role": "user", "content": question}]) == plain


@pytest.fixture
def exported(project: TestProject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model as a GGUF file in the project, and an experiment with it as base model."""
    folder = Path(shutil.copytree(PACKAGED["demo-base"], tmp_path_factory.mktemp("base") / "model"))
    path = export(folder, "bf16", load_tokenizer(str(folder)), [2], True)
    settings = (project.configs / "experiments" / "demo.yaml").read_text()
    project.write_experiment("demo", settings.replace("base_model: demo-base", "base_model: ./mine.gguf"))
    return Path(shutil.copy(path, project.root / "mine.gguf"))


def test_a_gguf_file_is_converted_once(project: TestProject, graph: Graph, exported: Path) -> None:
    with pytest.raises(ArtifactMissing, match=r"local/mine\.gguf.*cached_base_model"):
        Project().lineage("demo").expected(BASE_MODELS)
    first = graph.run("cached_base_model")
    assert first.success, first.log
    assert not first.reused
    again = graph.run("cached_base_model")
    assert again.reused == {"cached_base_model"}
    ref = Project().lineage("demo").expected(BASE_MODELS)
    assert ref.name.startswith("local/mine.gguf/")
    assert (project.store.fetch(ref) / "model.safetensors").stat().st_size > 3_900_000
    assert project.leftovers_of_builds() == []
    exported.write_bytes(exported.read_bytes()[:-1])
    damaged = graph.run("cached_base_model")
    assert "truncated: tensor" in damaged.failures["cached_base_model"]


def test_a_converted_model_of_somebody_else_is_not_used(project: TestProject, graph: Graph, exported: Path) -> None:
    lineage = Project().lineage("demo")
    source = lineage.base_source()
    name = f"{source.repo}/{source.revision}"
    mallory = open_store(project.store.url, "mallory", project.root / "cache-of-mallory")
    mallory.publish(PACKAGED["demo-base"], BASE_MODELS.folder, name, "f" * 64, {})
    assert lineage.find_base_model(name) is None, "this namespace has not converted the file"
    refused = graph.run("cached_base_model")
    assert "somebody else wrote it" in refused.failures["cached_base_model"]
    assert graph.run("cached_base_model", force=True).success
    ref = Project().lineage("demo").expected(BASE_MODELS)
    mallory.publish(PACKAGED["demo-base"], BASE_MODELS.folder, name, "f" * 64, {}, replace=True)
    with pytest.raises(ForeignContent, match=r"mine\.gguf"):
        Project().lineage("demo").expected(BASE_MODELS)
    assert ref.name == name


def test_a_plan_reads_the_shape_without_converting(project: TestProject, exported: Path) -> None:
    config = json.loads((shape_of(Project().lineage("demo")) / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (192, 4, 1024)
    assert project.published(BASE_MODELS.folder) == []
