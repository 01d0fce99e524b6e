"""Passages for a question: the same as in the evaluation, in the format that the adapter's folder describes."""

import json
from pathlib import Path

import pytest
from paths import ROOT
from projects import all_configs

from finetune_assets.config.documents import load_documents
from finetune_assets.config.loading import load_experiment
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.readers import SourceFile
from finetune_assets.data.serving_template import use_serving_template
from finetune_assets.data.tokenization import Encoder, load_tokenizer
from finetune_assets.retrieval.asking import RETRIEVAL_FILE, RetrievalFormat, Retriever
from finetune_assets.retrieval.contexts import Mode, RowContexts
from finetune_assets.retrieval.documents import read_documents
from finetune_assets.retrieval.index import build_index
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE_TOWNS
from finetune_assets.store.json_object import InvalidJson

DOCUMENTS = SAMPLE_TOWNS.parent / "documents"
ROWS = [json.loads(line) for line in SAMPLE_TOWNS.read_text(encoding="utf-8").splitlines()[:20]]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of the packaged documents."""
    folder, config = tmp_path_factory.mktemp("index"), load_documents(ROOT / "configs", "towns")
    files = [SourceFile(path.name, path) for path in sorted(DOCUMENTS.iterdir())]
    build_index(read_documents(files, config.columns), config, folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return load_experiment(all_configs(tmp_path), "demo-retrieval").config


def test_the_prompt_is_that_of_the_evaluation_and_each_source_is_where_the_text_is(
    index: Path, config: ExperimentConfig, tmp_path: Path
) -> None:
    assert config.data.retrieval
    RetrievalFormat.of_experiment(config.data, "f" * 64).write(tmp_path)
    tokenizer = load_tokenizer(str(PACKAGED["demo-base"]))
    encoder = Encoder(tokenizer, config.data)
    contexts = RowContexts(index, config.data.retrieval, "salt", encoder, config.data.tokenization.cutoff_len)
    rows = [{**row, "messages": None} for row in ROWS]
    retriever = Retriever(tmp_path, index)
    use_serving_template(tokenizer, config.data)
    for row, replaced in zip(rows, contexts.apply(rows, Mode.RETRIEVED), strict=True):
        found = retriever.find(row["instruction"])
        assert isinstance(replaced, dict)
        assert found.context == replaced["context"]
        served = tokenizer.apply_chat_template(found.messages, add_generation_prompt=True, return_dict=False)
        assert list(encoder.encode([replaced]).input_ids[: len(served)]) == list(served)
        for source in found.sources:
            assert source.text in (DOCUMENTS / source.source).read_text(encoding="utf-8")
            assert source.title in source.text, "the heading above the paragraph is its town"


def test_passages_that_do_not_fit_are_dropped_from_the_end(index: Path, config: ExperimentConfig) -> None:
    found = Retriever(RetrievalFormat.of_experiment(config.data, None), index).find(ROWS[0]["instruction"])
    two = found.fitting(lambda messages: "[3]" not in messages[0]["content"])
    assert [source.text for source in two.sources] == [source.text for source in found.sources[:2]]
    assert [message["role"] for message in two.messages] == ["context", "user"]
    assert found.fitting(lambda messages: len(messages) == 1).messages == [
        {"role": "user", "content": ROWS[0]["instruction"]}
    ]


def test_a_chat_template_has_question_and_passages_in_one_message(index: Path, config: ExperimentConfig) -> None:
    config.data.prompt_template.chat_template = True
    found = Retriever(RetrievalFormat.of_experiment(config.data, None), index).find(ROWS[0]["instruction"])
    assert found.messages == [{"role": "user", "content": f"{ROWS[0]['instruction']}\n\n{found.context}"}]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"documents": "towns"}', '{"documents": "towns", "passages": "3"}', '{"passages": 3}']
)
def test_a_broken_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RETRIEVAL_FILE).write_text(text)
    with pytest.raises(InvalidJson):
        RetrievalFormat.read(tmp_path)
