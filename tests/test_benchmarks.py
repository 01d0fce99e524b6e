"""The comparison with other trainers: as many settings for every side, no peer missing silently, and its ratios."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers, train
from benchmarks.train_candidates import SIZES, candidates, fastest
from benchmarks.train_ratios import bf16_reason, ratios, summary
from benchmarks.train_subject import SHAPES
from finetune_assets.sources.local import SAMPLE

ROWS = {
    "a reference": {"tokens_per_cpu_s": 100.0, "peak_memory_mib": 900.0, "mfu": 0.1},
    "b HF Trainer": {"tokens_per_cpu_s": 200.0, "peak_memory_mib": 1000.0, "mfu": 0.2},
    "c TRL": {"tokens_per_cpu_s": 250.0, "peak_memory_mib": 2000.0, "mfu": 0.25},
    "e ours, fp32": {"tokens_per_cpu_s": 300.0, "peak_memory_mib": 1200.0, "mfu": 0.5},
    "e ours, bf16": {"tokens_per_cpu_s": 600.0, "peak_memory_mib": 800.0, "mfu": 0.4},
}


@pytest.mark.parametrize("precisions", [["fp32"], ["fp32", "bf16"]])
def test_every_side_has_as_many_settings(precisions: list[str]) -> None:
    recipes = candidates(precisions)
    ours = [settings for name, recipe in recipes.items() if name[0] == "e" for settings in recipe.candidates]
    for name in ("b HF Trainer", "c TRL", "d LLaMA-Factory"):
        tried = recipes[name].candidates
        assert len(tried) == len(ours) == 4 * len(precisions)
        assert sum(bool(settings.get("bf16")) for settings in tried) == 4 * ("bf16" in precisions)
    assert {settings["precision"] for settings in ours} == {*precisions}


def test_ours_takes_no_more_memory_than_the_fastest_peer() -> None:
    tried = {
        "b HF Trainer": {"tokens_per_s": 70.0, "peak_memory_mib": 1000.0},
        "c TRL": {"tokens_per_s": 60.0, "peak_memory_mib": 5000.0},
        "e ours, bf16": {"tokens_per_s": 90.0, "peak_memory_mib": 3000.0},
    }
    ours = [
        {"micro": 1, "tokens_per_s": 90.0, "peak_memory_mib": 900.0},
        {"micro": 2, "tokens_per_s": 95.0, "peak_memory_mib": 1000.0},
        {"micro": 4, "tokens_per_s": 99.0, "peak_memory_mib": 1001.0},
    ]
    limit = train.memory_of_fastest_peer(tried, "tokens_per_s")
    assert limit == 1000
    assert fastest(ours, "tokens_per_s", limit)["micro"] == 2
    assert fastest(ours, "tokens_per_s")["micro"] == 4
    assert fastest(ours, "tokens_per_s", 800)["micro"] == 4, "none takes so little"
    assert train.memory_of_fastest_peer({}, "tokens_per_s") is None


def test_the_real_shape_is_smollm2() -> None:
    shape = SHAPES["smollm2-135m"]
    assert (shape["vocab_size"], shape["num_hidden_layers"]) == (49_152, 30)
    hidden, width, grouped = shape["hidden_size"], shape["intermediate_size"], 64 * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * grouped + 3 * hidden * width + 2 * hidden
    assert shape["vocab_size"] * hidden + 30 * layer + hidden == 134_515_008, "as in the published model"
    assert [*SIZES] == ["13m", "smollm2-135m"]


def test_ratios_are_of_the_best_against_the_best() -> None:
    found = ratios(ROWS, "tokens_per_cpu_s")
    assert found["vs_best_peer"] == 600 / 250
    assert found["rss_vs_best_peer"] == 800 / 2000
    assert found["vs_reference"] == 6
    assert found["bf16_vs_fp32"] == 2
    assert found["mfu"] == 0.5, "that of float32"
    fp32 = ratios({name: row for name, row in ROWS.items() if "bf16" not in name}, "tokens_per_cpu_s")
    assert (fp32["vs_best_peer"], "bf16_vs_fp32" in fp32) == (300 / 250, False)
    both = summary({"13m": found, "smollm2-135m": fp32})
    assert both["vs_best_peer"] == 300 / 250
    assert both["rss_vs_best_peer"] == 1200 / 2000
    assert both["bf16_vs_fp32"] == 2


def test_a_peer_that_cannot_be_installed_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["peers", "trl"])
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(SystemExit) as error:
        peers.main()
    assert "trl" in str(error.value.code)
    assert "no such package" in str(error.value.code)
    assert not peers.is_installed("trl")


def test_an_environment_of_other_versions_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / peers.INSTALLED).write_text("trl==0.1\n")
    assert not peers.is_installed("trl")


@pytest.mark.system
@pytest.mark.soak
def test_missing_peers_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    arguments = ["train", "--quick", "--json", "--shape", "13m", "--only", "bcde", "--rows", str(SAMPLE)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--precision", "fp32"])
    train.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["missing"].keys() == {"d LLaMA-Factory"}, "TRL is a package for development"
    assert "benchmarks.peers llamafactory" in found["missing"]["d LLaMA-Factory"]
    assert found["precisions"] == ["fp32"]
    assert found["shapes"].keys() == {"13m"}
    for name in ("vs_best_peer", "rss_vs_best_peer", "mfu"):
        assert found[name] == found["shapes"]["13m"][name] > 0


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "avx512_f"])
def test_without_a_ratio_of_precisions_there_is_a_reason(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert ("avx512_bf16" in bf16_reason()["bf16_vs_fp32_reason"]) == (capability == "avx512_f")
