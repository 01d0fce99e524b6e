"""How fast rows are measured, how honest the gate is, and how small a gain it finds: `python -m benchmarks.evaluation`.

On Dolly and stories260K where they lie beside the project, on the packaged rows and model elsewhere. Two adapters that
differ in their seed alone are trained and measured on the gate's rows. Speed: rows a second of the evaluation's loss,
over those of the training's own forward pass on the same rows, in turn. Honesty: how many of 1,000 random exchanges of
who is who the gate would promote. Power: the smallest true gain that it finds in 80% of draws of as many rows.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import ROOT, Runs, arguments, interleaved, median, report
from finetune_assets.config.loading import load_experiment
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.ingest import PARQUET, write_raw
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.readers import SourceFile
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.contenders import Contender, LoadedModels
from finetune_assets.evaluation.gate import paired_gain
from finetune_assets.evaluation.losses import RowLosses
from finetune_assets.evaluation.rows import held_out
from finetune_assets.sources.base_models import PACKAGED
from finetune_assets.sources.local import SAMPLE
from finetune_assets.training.batches import collate
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.order import Examples, evaluation_batches
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

DOLLY = ROOT.parent / "shared" / "data" / "dolly" / "databricks-dolly-15k.jsonl"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
SETTINGS = ["data.tokenization.packing=false", "training.macro_batch_size=12", "training.micro_batch_size=6"]
SETTINGS += ["training.max_steps=12", "training.learning_rate=5e-3", "training.precision=fp32", "lora.rank=8"]
ALONE = DistributedContext(rank=0, world=1, device=torch.device("cpu"))
MADE_FROM = {"fingerprint": "f" * 64, "experiment": "benchmark", "base_model": "local/base", "revision": "r"}
POWER = 0.8


def configured(*more: str) -> ExperimentConfig:
    return load_experiment(ROOT / "configs", "demo", [*SETTINGS, *more]).config


def main() -> None:
    args = arguments(__doc__).parse_args()
    real = DOLLY.exists() and STORIES.exists()
    source, base = (DOLLY, STORIES) if real else (SAMPLE, PACKAGED["demo-base"])
    shape = ["data.tokenization.cutoff_len=512", "data.gate_fraction=0.05"] if real else ["data.gate_fraction=0.4"]
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepared(source, base, configured(*shape), Path(folder))
        runs = [trained(dataset, base, configured(*shape, f"training.seed={seed}"), Path(folder)) for seed in (1, 2)]
        rows = held_out(dataset, "gate", runs[0].config.data).examples
        losses = [measured(run, rows) for run in runs]
        speeds = speed(runs[0], rows, 1 if args.quick else 3)
    saved, tokens = losses[0] - losses[1], rows.learned
    flips = 200 if args.quick else 1_000
    chance = by_chance(saved, tokens, flips)
    gain, error = smallest_found(saved, tokens, 100 if args.quick else 400)
    ours, theirs = (median(speeds[name], "rows") for name in ("evaluation", "training"))
    lines = {
        "rows of the gate": f"{len(rows):,} ({'Dolly, stories260K' if real else 'packaged'})",
        "rows a second, evaluation": f"{ours:,.0f}",
        "rows a second, training's forward pass": f"{theirs:,.0f}",
        f"promoted of {flips} random exchanges, at 95%": f"{chance}",
        f"smallest gain found in {POWER:.0%} of draws": f"{gain:.4f} nats a token ({gain / error:.2f} standard errors)",
    }
    report(
        "Evaluation and gate",
        [*lines.items()],
        {
            "rows_per_s_vs_training_forward": ours / theirs,
            "promoted_by_chance_per_1000": chance * 1_000 / flips,
            "smallest_gain_found": gain,
        },
        args.json,
    )


def prepared(source: Path, base: Path, config: ExperimentConfig, folder: Path) -> Path:
    raw, dataset = folder / "raw", folder / "dataset"
    raw.mkdir()
    dataset.mkdir()
    write_raw([SourceFile(source.name, source)], Columns(), raw)
    prepare_dataset(raw / PARQUET, load_tokenizer(str(base)), config.data, "salt", dataset)
    return dataset


def trained(dataset: Path, base: Path, config: ExperimentConfig, folder: Path) -> LoraFinetune:
    output = folder / f"seed-{config.training.seed}"
    output.mkdir()
    job = TrainingPaths(base, dataset, output, folder / f"scratch-{config.training.seed}", MADE_FROM)
    run = LoraFinetune(job, config, ALONE, Reporter(lambda line: None))
    run.run()
    return run


def measured(run: LoraFinetune, rows: Examples) -> NDArray[np.float64]:
    contender = Contender.of_folder("challenger", run.job.base_model, run.job.output)
    with LoadedModels(ALONE.device).loaded(contender) as model:
        return RowLosses(model, run.config, ALONE.device).of(rows)


def speed(run: LoraFinetune, rows: Examples, times: int) -> Runs:
    """Rows a second, of both in turn."""
    budget = run.config.training.micro_batch_size * run.longest
    (batches,) = evaluation_batches(rows, 1, run.config.training.micro_batch_size, budget)
    contender = Contender.of_folder("challenger", run.job.base_model, run.job.output)

    def training() -> dict[str, float]:
        run.model.train()
        run.model.get_base_model().set_attn_implementation("varlen")
        began = time.perf_counter()
        for sequences in batches:
            run._loss(collate(sequences, rows, ALONE.device, True))
        return {"rows": len(rows) / (time.perf_counter() - began)}

    with LoadedModels(ALONE.device).loaded(contender) as model:

        def evaluation() -> dict[str, float]:
            began = time.perf_counter()
            RowLosses(model, run.config, ALONE.device).of(rows)
            return {"rows": len(rows) / (time.perf_counter() - began)}

        return interleaved({"evaluation": evaluation, "training": training}, times)


def by_chance(saved: NDArray[np.float64], tokens: NDArray[np.int64], flips: int) -> int:
    """How often the gate promotes where the two are exchanged row by row, at random."""
    rng = np.random.default_rng(0)
    return sum(
        paired_gain(saved * rng.choice([-1.0, 1.0], len(saved)), np.zeros_like(saved), tokens, 0.95, flip).lower > 0
        for flip in range(flips)
    )


def smallest_found(saved: NDArray[np.float64], tokens: NDArray[np.int64], draws: int) -> tuple[float, float]:
    """The smallest true gain, in nats a token, that is promoted in `POWER` of the draws; and its standard error."""
    centred = saved - saved.sum() / tokens.sum() * tokens
    error = float(np.sqrt((centred**2).sum()) / tokens.sum())
    rng = np.random.default_rng(1)
    chosen = [rng.integers(0, len(saved), len(saved)) for _ in range(draws)]
    # Adding a gain to every token moves the lower bound by as much
    bounds = [
        paired_gain(centred[rows], np.zeros(len(rows)), tokens[rows], 0.95, draw).lower
        for draw, rows in enumerate(chosen)
    ]
    return float(-np.quantile(bounds, 1 - POWER)), error


if __name__ == "__main__":
    main()
