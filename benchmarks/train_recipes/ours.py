"""(e) This project's trainer."""

import tempfile
from pathlib import Path

from benchmarks.train_recipes.meter import Meter, given
from finetune_assets.config.schema import Data, ExperimentConfig, Lora, Model, Tokenization, Training
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths


def main() -> None:
    subject, settings, device = given()
    precision = settings.get("precision", "auto")
    config = ExperimentConfig(
        model=Model(
            base_model=subject.model,
            dtype={"bf16": "bfloat16", "fp32": "float32"}.get(precision, "auto"),
            quantization=settings.get("quantization", "none"),
        ),
        data=Data(tokenization=Tokenization(cutoff_len=subject.length)),
        training=Training(
            objective=settings.get("objective", "sft"),
            epochs=1,
            max_steps=settings.get("steps"),
            macro_batch_size=subject.sequences_a_step,
            micro_batch_size=settings["micro"],
            learning_rate=subject.learning_rate,
            lr_scheduler="constant",
            warmup_steps=0,
            save_steps=None,
            precision=precision,
            compile=settings.get("compile", False),
            kernels=settings.get("kernels", "none"),
        ),
        lora=Lora(rank=settings.get("rank", 16), dropout=settings.get("dropout", 0.05)),
    )
    scratch = Path(tempfile.mkdtemp()) if config.training.objective != "sft" else Path("/nowhere")
    job = TrainingPaths(Path(subject.model), Path(subject.packed), Path("/nowhere"), scratch, {})
    run = LoraFinetune(job, config, DistributedContext(0, 1, device), Reporter(print))
    if run.objective:
        print(run.objective.prepare_reference())
    meter = Meter(run.multiplied_weights, device, run.precision)
    for number, work in run._work():
        step = run.train_step(number, work)
        meter.step_done(step.tokens)
        meter.loss, meter.grad_norm = float(step.loss), float(step.grad_norm)
    meter.report(active=run.log.active)


if __name__ == "__main__":
    main()
