"""What a worker loads, and what it can still load afterwards. Each in a process of its own: imports happen once."""

import json
import subprocess
import sys
from typing import Any

import pytest

HEAVY = ("bitsandbytes", "boto3", "botocore", "scipy", "torch._dynamo", "torch._inductor")
BEGIN = f"""
import json, os, sys
from finetune_assets.worker.process import forbid_hub
from finetune_assets.worker.model_libraries import import_lean, lean_imports
def heavy():
    return [name for name in {HEAVY} if getattr(sys.modules.get(name), "__file__", None)]
forbid_hub()
"""


def printed(program: str) -> Any:
    """The JSON on the last line that a program prints."""
    command = [sys.executable, "-c", BEGIN + program]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.system
def test_workers_import_what_they_use_and_quantize_when_they_are_to() -> None:
    """Also in a process that was forked from one that has imported everything and trained a whole model.

    None of them needs Dagster.
    """
    found = printed(
        """
sys.modules["dagster"] = sys.modules["dagster_aws"] = None
import finetune_assets.worker.bootstrap
for worker in ("training", "evaluation", "merging", "merging.stacking"):
    import_lean(f"finetune_assets.{worker}.cli")
imported = heavy()

import torch
torch.set_num_threads(1)  # a fork of a process with OpenMP threads waits for them forever
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.training.model import load_base, with_adapter

def layers(quantization):
    config = ExperimentConfig()
    config.model.base_model, config.model.quantization = "demo-base", quantization
    base = load_base(PACKAGED["demo-base"], config.model, config.training, torch.device("cpu"))
    model = with_adapter(base, config, None)
    loss = model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    learned = all(p.grad is not None for p in model.parameters() if p.requires_grad)
    kinds = {type(module).__module__ + "." + type(module).__name__ for module in model.modules()}
    return sorted(kind for kind in kinds if kind.startswith("peft.tuners.lora")), learned

plain, computed = layers("none"), heavy()
reading, writing = os.pipe()
if os.fork() == 0:
    with os.fdopen(writing, "w") as out:
        json.dump([layers("nf4"), layers("int8"), heavy()], out)
    os._exit(0)
os.close(writing)
with os.fdopen(reading) as told:
    forked = json.load(told)

print(json.dumps({"imported": imported, "plain": plain, "computed": computed, "forked": forked}))
"""
    )
    assert found["imported"] == []
    assert found["computed"] == []
    assert found["plain"] == [["peft.tuners.lora.layer.Linear", "peft.tuners.lora.model.LoraModel"], True]
    nf4, int8, loaded = found["forked"]
    assert nf4 == [["peft.tuners.lora.bnb.Linear4bit", "peft.tuners.lora.model.LoraModel"], True]
    assert int8 == [["peft.tuners.lora.bnb.Linear8bitLt", "peft.tuners.lora.model.LoraModel"], True]
    assert "bitsandbytes" in loaded


@pytest.mark.system
def test_what_was_put_off_is_whole_afterwards() -> None:
    found = printed(
        """
with lean_imports():
    import transformers.masking_utils, transformers.modeling_utils
    import transformers.loss.loss_for_object_detection as detection
    from transformers.integrations import deepgemm
    before = heavy()
    import torch._dynamo.config  # no name of the stand-in, and a submodule beside it: all of the compiler comes
    within = sys.modules["torch._dynamo"].__file__
import torch
import boto3, bitsandbytes.optim
from torch._dynamo import trace_rules
allowed = trace_rules.lookup_callable(deepgemm._load_deepgemm_kernel).__name__
double = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
with transformers.masking_utils.TransformGetItemToIndex():
    pass
print(json.dumps({
    "before": before,
    "same": torch._dynamo.config is sys.modules["torch._dynamo.config"] and within == torch._dynamo.__file__,
    "marked": deepgemm.is_sm100._dynamo_marked_constant,
    "allowed": allowed,
    "compiled": double(torch.ones(1)).item(),
    "assigned": [part.tolist() for part in detection.linear_sum_assignment([[1, 2], [3, 0]])],
    "client": boto3.client.__module__,
    "optimizer": bitsandbytes.optim.AdamW8bit.__name__,
}))
"""
    )
    assert found == {
        "before": [],
        "same": True,
        "marked": True,
        "allowed": "TorchInGraphFunctionVariable",
        "compiled": 2.0,
        "assigned": [[0, 1], [0, 1]],
        "client": "boto3",
        "optimizer": "AdamW8bit",
    }
