"""What a plan takes, and how near its time is to what a training took: `python -m benchmarks.preflight`.

A configuration of 70 billion weights is planned in a process of its own, the imports of torch, transformers and peft
told apart. Then an experiment is trained through the graph, and again with other settings:
the second time what its plan said, from the first, is compared with what the trainer measured. Memory, predicted and
measured, is compared by `SOAK=1 pytest -s tests/preflight`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, arguments, in_process, report
from benchmarks.train_subject import SHAPES

OVERRIDES = ["hardware.gpu=H100", "data.tokenization.cutoff_len=2048", "training.precision=bf16"]
MEASURED = "--plan-70b"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(MEASURED, action="store_true", help="plan it in this process, and print what it took")
    args = parser.parse_args()
    if args.plan_70b:
        print(json.dumps(plan_70b()))
        return
    large = in_process("benchmarks.preflight", MEASURED)
    steps = (10, 20) if args.quick else (60, 150)
    predicted, measured = trained_twice(*steps)
    rows = [
        ("70B: imports of torch, transformers, peft", f"{large['imports_s']:.1f} s"),
        ("70B: planning", f"{large['plan_s']:.1f} s"),
        ("70B: peak memory", f"{large['peak_mib']:.0f} MiB"),
        (f"training of {steps[1]} steps, predicted", f"{predicted:.1f} s"),
        (f"training of {steps[1]} steps, measured", f"{measured:.1f} s"),
    ]
    ratios = {"plan_70b_s": large["plan_s"], "plan_70b_mib": large["peak_mib"]}
    report("Planning", rows, {**ratios, "predicted_vs_measured_time": predicted / measured}, args.json)


def plan_70b() -> dict[str, float]:
    """Seconds and MiB of a plan that tries what would fit, too."""
    began = time.monotonic()
    from transformers import AutoConfig

    from finetune_assets.config.loading import load_experiment
    from finetune_assets.preflight.case import Shape
    from finetune_assets.preflight.plan import make_plan
    from finetune_assets.preflight.simulation import simulated  # imported by the first simulation otherwise
    from finetune_assets.training.process_memory import peak_resident_mib

    imported = time.monotonic()
    experiment = load_experiment(ROOT / "configs", "demo", OVERRIDES).config
    assert simulated
    make_plan(Shape.of(AutoConfig.for_model("llama", **SHAPES["llama-3-70b"], dtype="bfloat16")), experiment)
    planned = time.monotonic()
    return {"imports_s": imported - began, "plan_s": planned - imported, "peak_mib": peak_resident_mib()}


def trained_twice(first: int, second: int) -> tuple[float, float]:
    """Seconds of a training as planned after another one, and as measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        (folder / "home").mkdir()
        environment = os.environ | {
            "FINETUNE_CONFIGS": str(folder / "configs"),
            "FINETUNE_NAMESPACE": "benchmark",
            "DAGSTER_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        for steps in (first, second):
            overrides = [f"training.max_steps={steps}", f"training.learning_rate={1e-3 * steps / second}"]
            config = json.dumps({"resources": {"project": {"config": {"overrides": overrides}}}})
            command = ["-m", "dagster", "asset", "materialize", "-m", "finetune_assets.definitions"]
            command += ["--select", "*lora_adapter", "--partition", "demo", "--config-json", config]
            subprocess.run([sys.executable, *command], env=environment, check=True, stderr=subprocess.DEVNULL)
        store = folder / ".finetune" / "store" / "benchmark"
        states = [json.loads(path.read_text()) for path in store.glob("adapters/*/*/trainer_state.json")]
        plans = [json.loads(path.read_text()) for path in store.glob("plans/*/*/plan.json")]
    (state,) = (state for state in states if state["steps"] == second)
    (plan,) = (plan for plan in plans if plan["work"]["steps"] == second)
    return plan["hours"] * 3600, state["seconds"]


if __name__ == "__main__":
    main()
