"""A talk in the terminal with base, champion and challenger."""

from pathlib import Path

import commands
import pytest
from projects import TestProject, all_configs
from trainings import Train

from finetune_assets.cli.conversation import HELP, Conversation, run
from finetune_assets.config.documents_schema import DocumentColumns, DocumentsConfig
from finetune_assets.config.loading import load_experiment
from finetune_assets.data.readers import SourceFile
from finetune_assets.evaluation.contenders import BASE, CHALLENGER, CHAMPION, Contender
from finetune_assets.retrieval.documents import read_documents
from finetune_assets.retrieval.index import build_index
from finetune_assets.sources.base_models import PACKAGED

FOLDER = PACKAGED["demo-base"]
SMALL = ("training.macro_batch_size=2", "training.micro_batch_size=2", "training.learning_rate=5e-3")


@pytest.fixture
def talk(trained: Train) -> Conversation:
    runs = [trained(f"training.max_steps={steps}", *SMALL) for steps in (4, 12)]
    names = (CHAMPION, CHALLENGER)
    seats = [Contender.of_folder(name, FOLDER, one.job.output) for name, one in zip(names, runs, strict=True)]
    return Conversation([Contender(BASE, FOLDER, runs[0].config), *seats], max_new_tokens=6)


@pytest.mark.system
def test_each_answers_as_it_does_alone(talk: Conversation) -> None:
    question = "Which river runs through Kelm?"
    together = {name: talk.answer(name, question) for name in (CHAMPION, BASE, CHALLENGER, BASE, CHAMPION)}
    assert len(talk.loaded) == 1, "one base model for all"
    for contender in talk.contenders:
        alone = Conversation([contender], max_new_tokens=6)
        assert alone.answer(contender.name, question) == together[contender.name]
    assert len({*together.values()}) == 3


def test_commands(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/help", "", "Where does Kelm lie?", "/base", "Where?", "/all", "Who?", "/nobody", "/new", "/quit", "no"]
    run(talk, iter(lines))
    said = capsys.readouterr().out
    assert said.startswith(HELP)
    assert talk.active == "all"
    for told in ("[base]", "[champion]", "[challenger]", "/nobody"):
        assert told in said
    assert talk.history == {}


def test_a_question_comes_with_passages_and_the_sources_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "towns.md").write_text("# Kelm\n\nThe river of Kelm is the Tarn.\n\n# Brae\n\nBrae sells salt.\n")
    documents = read_documents([SourceFile("towns.md", tmp_path / "towns.md")], DocumentColumns())
    (tmp_path / "index").mkdir()
    build_index(documents, DocumentsConfig(), tmp_path / "index")
    config = load_experiment(all_configs(tmp_path), "demo-retrieval").config
    talk = Conversation([Contender(BASE, FOLDER, config)], max_new_tokens=2, index=tmp_path / "index")
    run(talk, iter(["Which river runs through Kelm?", "/sources", "/quit"]))
    printed = capsys.readouterr().out
    assert talk.found
    assert [source.text for source in talk.found.sources] == ["The river of Kelm is the Tarn."]
    assert "[1] Kelm, towns.md, passage 1" in printed
    assert "The river of Kelm is the Tarn." in printed
    closed = Conversation([Contender(BASE, FOLDER, config)], max_new_tokens=2)
    run(closed, iter(["Which river runs through Kelm?"]))
    assert closed.found is None
    assert "towns.md" not in capsys.readouterr().out


def test_an_experiment_without_an_adapter_is_refused(project: TestProject, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = commands.run(capsys, "chat", "demo")
    assert code == 1
    assert "demo" in err
    assert "lora_adapter" in err, "what is to be materialized first"
