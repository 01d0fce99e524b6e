"""Impossible settings of retrieval fail at load, at the setting that is wrong."""

import shutil
from pathlib import Path

import pytest
from paths import ROOT

from finetune_assets.artifacts.kinds import EVALUATIONS, TOKENIZED
from finetune_assets.automation.settings_hash import SETTINGS
from finetune_assets.config.errors import ConfigError
from finetune_assets.config.loading import Experiment, load_experiment
from finetune_assets.config.retrieval_validation import MODES, gate_mode, measured_modes

TOWNS = "data.retrieval.documents=towns"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "documents").mkdir(exist_ok=True)
    (tmp_path / "configs" / "documents" / "towns.yaml").write_text("from_contexts: true\n")
    return tmp_path / "configs"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.retrieval.documents=twons"], "data.retrieval.documents"),
        (["data.retrieval.passages=2"], "data.retrieval.documents"),
        ([TOWNS, "data.retrieval.passages=0"], "data.retrieval.passages"),
        ([TOWNS, "data.retrieval.fewest_passages=0"], "data.retrieval.fewest_passages"),
        ([TOWNS, "data.retrieval.fewest_passages=4"], "data.retrieval.fewest_passages"),
        ([TOWNS, "data.retrieval.golden_share=1.5"], "data.retrieval.golden_share"),
        ([TOWNS, "data.retrieval.golden_share=0", "data.retrieval.cite=true"], "data.retrieval.golden_share"),
        ([TOWNS, "data.retrieval.without_golden=refuse"], "data.retrieval.refusal"),
        ([TOWNS, "data.retrieval.refusal=No."], "data.retrieval.refusal"),
        ([TOWNS, "data.retrieval.cite=true", "data.retrieval.closed_book=true"], "data.retrieval.cite"),
        ([TOWNS, "data.tokenization.train_on_inputs=true"], "data.tokenization.train_on_inputs"),
        ([TOWNS, "evaluation.modes=[golden]"], "evaluation.modes"),
        ([TOWNS, "evaluation.modes=[retrieved, gold]"], "evaluation.modes"),
        ([TOWNS, "evaluation.modes=[retrieved, retrieved]"], "evaluation.modes"),
        ([TOWNS, "evaluation.modes=[retrieved]", "gate.mode=golden"], "gate.mode"),
        ([TOWNS, "gate.max_loss_of={closed: 0.1}"], "gate.max_loss_of.closed"),
        ([TOWNS, "gate.max_loss_of={retrieved: 0.1}"], "gate.max_loss_of.retrieved"),
        ([TOWNS, "gate.max_loss_of={golden: -1}"], "gate.max_loss_of.golden"),
        (["evaluation.modes=[retrieved]"], "evaluation.modes"),
        (["gate.mode=retrieved"], "gate.mode"),
        (["gate.max_loss_of={closed_book: 0.1}"], "gate.max_loss_of"),
    ],
)
def test_impossible_settings_are_refused_by_name(configs: Path, overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as problem:
        load_experiment(configs, "demo", overrides)
    assert f": {key}: " in str(problem.value)


def test_defaults_are_all_modes_and_the_one_that_serves(configs: Path) -> None:
    config = load_experiment(configs, "demo", [TOWNS]).config
    assert (measured_modes(config), gate_mode(config)) == (MODES, "retrieved")
    some = load_experiment(configs, "demo", [TOWNS, "evaluation.modes=[retrieved, golden]", "gate.mode=golden"]).config
    assert (measured_modes(some), gate_mode(some)) == (("golden", "retrieved"), "golden")
    without = load_experiment(configs, "demo").config
    assert (measured_modes(without), gate_mode(without)) == ((), None)


def test_each_setting_re_runs_what_reads_it_and_nothing_else(configs: Path) -> None:
    def identities(*overrides: str) -> tuple[str, str, str | None]:
        config = load_experiment(configs, "demo", [TOWNS, *overrides]).config
        given = [dict.fromkeys(kind.inputs, "") for kind in (TOKENIZED, EVALUATIONS)]
        gate = SETTINGS["champion_adapter"](Experiment("demo", config), "")
        return TOKENIZED.fingerprint(config, **given[0]), EVALUATIONS.fingerprint(config, **given[1]), gate

    usual = identities()
    rows = ("passages=2", "golden_share=0.5", "distractors=random", "order=ranked", "cite=true", "closed_book=true")
    for setting in rows:
        changed = identities(f"data.retrieval.{setting}")
        assert [new == old for new, old in zip(changed, usual, strict=True)] == [False, True, True], setting
    assert identities("data.retrieval.retrain=true") == usual
    measured = identities("evaluation.modes=[retrieved]")
    assert [new == old for new, old in zip(measured, usual, strict=True)] == [True, False, True]
    judged = identities("gate.mode=golden")
    assert [new == old for new, old in zip(judged, usual, strict=True)] == [True, True, False]
