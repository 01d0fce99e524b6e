"""The size and the rank of what an adapter adds to each module."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training.measuring import names

from finetune_assets.artifacts.update_spectrum import suggested
from finetune_assets.training.model import ModelError
from finetune_assets.training.updates import updates

PREFIX = "base_model.model.model.layers"


def adapter(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], **config: object) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{PREFIX}.{module}.lora_A.weight": a, f"{PREFIX}.{module}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_norm_is_that_of_the_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 30), torch.randn(20, 4)
    (found,) = updates(adapter(tmp_path / "a", {"0.self_attn.q_proj": (a, b)}))
    assert found.norm == pytest.approx(float((b @ a * 2).norm()), rel=1e-4)
    assert (found.module, found.layer, found.kind, found.rank) == ("model.layers.0.self_attn.q_proj", 0, "q_proj", 4)
    (slower,) = updates(adapter(tmp_path / "b", {"0.self_attn.q_proj": (a, b)}, use_rslora=True))
    assert slower.norm == pytest.approx(2 * found.norm, rel=1e-4)


def test_effective_rank_counts_directions(tmp_path: Path) -> None:
    ways = torch.linalg.qr(torch.randn(20, 4, generator=torch.manual_seed(0)))[0]
    rows = torch.linalg.qr(torch.randn(30, 4, generator=torch.manual_seed(1)))[0].t().contiguous()
    sizes = {"equal": [1, 1, 1, 1], "one": [1, 0, 0, 0], "none": [0, 0, 0, 0], "falling": [4, 1, 0.1, 0.1]}
    pairs = {
        f"{layer}.mlp.up_proj": (rows.clone(), (ways * torch.tensor(size)).contiguous())
        for layer, size in enumerate(sizes.values())
    }
    equal, one, none, falling = updates(adapter(tmp_path / "a", pairs))
    assert equal.effective_rank == pytest.approx(4, rel=1e-4)
    assert one.effective_rank == pytest.approx(1, rel=1e-3)
    assert (none.norm, none.effective_rank) == (0, 0)
    assert [update.enough for update in (equal, one, none, falling)] == [4, 1, 1, 1]
    rank, pattern = suggested([equal, one, none, falling])
    assert (rank, pattern) == (1, {"model.layers.0.mlp.up_proj": 4})


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        updates(tmp_path)
    assert names(error, tmp_path)
