"""Two trees of settings, setting by setting."""

from dataclasses import asdict

from paths import ROOT

from finetune_assets.config.comparing import ABSENT, SettingDifference, differences
from finetune_assets.config.loading import base_settings, load_experiment


def test_every_setting_that_differs_is_told_and_no_other() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": {}, "f": True}
    after = {"a": 1, "b": {"c": [1, 2, 3], "d": "x"}, "e": {"q": 8}, "f": False, "g": "two\nlines"}
    assert differences(before, after) == [
        SettingDifference("b.c", "[1, 2]", "[1, 2, 3]"),
        SettingDifference("f", "true", "false"),
        SettingDifference("e.q", ABSENT, "8"),
        SettingDifference("g", ABSENT, '"two\\nlines"'),
    ]
    assert differences(before, before) == []


def test_a_group_that_is_null_on_one_side_is_told_by_its_members() -> None:
    assert differences({"wandb": None}, {"wandb": {"project": "p"}}) == [
        SettingDifference("wandb.project", ABSENT, "p")
    ]
    assert differences({"wandb": {"project": "p"}}, {"wandb": None}) == [
        SettingDifference("wandb.project", "p", ABSENT)
    ]


def test_an_experiment_against_what_all_begin_with() -> None:
    configs = ROOT / "configs"
    found = differences(base_settings(configs), asdict(load_experiment(configs, "demo", ["lora.rank=7"]).config))
    told = {one.setting: (one.before, one.after) for one in found}
    assert told["model.base_model"] == ("???", "demo-base")
    assert told["lora.rank"] == ("16", "7")
    assert told["data.tokenization.cutoff_len"] == ("512", "192")
    assert "training.seed" not in told
