"""Whether replayed rows lower forgetting: `python -m benchmarks.replay`.

Needs Dolly and stories260K beside the project.

A stream first has rows of some categories (`OLD`), and then only rows of others (`NEW`). An adapter is trained on the
first version, and two go on from it on the second: one on its rows alone, one with a share of replayed rows. All are
measured on held-out rows of the old categories. The gain of replay is that of the loss of each row, in pairs, with the
gate's interval; several seeds show whether it is beyond the noise of training.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.evaluation import ALONE, DOLLY, MADE_FROM, STORIES, configured, measured
from benchmarks.harness import arguments, report
from finetune_assets.config.raw_data_schema import Columns
from finetune_assets.config.schema import ExperimentConfig
from finetune_assets.data.ingest import PARQUET, write_raw
from finetune_assets.data.prepare import prepare_dataset
from finetune_assets.data.raw_files import RawPart
from finetune_assets.data.readers import SourceFile
from finetune_assets.data.tokenization import load_tokenizer
from finetune_assets.evaluation.gate import paired_gain
from finetune_assets.evaluation.rows import held_out
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths

OLD = ("classification", "information_extraction")
NEW = ("open_qa", "general_qa", "creative_writing")
SHARES = (0.0, 0.05, 0.2)
SHAPE = ("data.tokenization.cutoff_len=256", "data.gate_fraction=0.1", "training.learning_rate=3e-3")


def main() -> None:
    args = arguments(__doc__).parse_args()
    if not (DOLLY.exists() and STORIES.exists()):
        raise SystemExit(f"{DOLLY} and {STORIES} are needed")
    seeds, steps = (1, 20) if args.quick else (3, 60)
    gains: dict[float, list[float]] = {share: [] for share in SHARES[1:]}
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old, new = (raw(folder / kind, categories) for kind, categories in (("old", OLD), ("new", NEW)))
        first = prepared(folder / "first", [RawPart("stream", old)], 0.0)
        both = [RawPart("stream", new), RawPart("stream", old, replay=True)]
        later = {share: prepared(folder / f"later-{share}", both[: 1 + bool(share)], share) for share in SHARES}
        gate = held_out(first, "gate", configured(*SHAPE).data).examples
        for seed in range(seeds):
            settings = configured(*SHAPE, f"training.seed={seed}", f"training.max_steps={steps}")
            first_run = train(first, settings, folder / f"{seed}-first")
            losses = {"before": measured(first_run, gate)}
            for share, dataset in later.items():
                run = train(dataset, settings, folder / f"{seed}-{share}", first_run.job.output)
                losses[str(share)] = measured(run, gate)
            for share in SHARES[1:]:
                gain = paired_gain(losses["0.0"], losses[str(share)], gate.learned, 0.95, seed)
                gains[share].append(gain.mean)
                forgotten = [(losses[key] - losses["before"]).sum() / gate.learned.sum() for key in ("0.0", str(share))]
                rows.append(
                    (
                        f"seed {seed}, replay {share:g}",
                        f"forgotten {forgotten[0]:+.4f} without, {forgotten[1]:+.4f} with; less by {gain.mean:.4f} "
                        f"(95% lower bound {gain.lower:.4f}) nats/token",
                    )
                )
    ratios = {f"least_gain_of_replay_{share:g}": min(values) for share, values in gains.items()}
    ratios |= {f"mean_gain_of_replay_{share:g}": float(np.mean(values)) for share, values in gains.items()}
    report(f"Replay, {len(gate)} held-out rows of {', '.join(OLD)}", rows, ratios, args.json)


def raw(folder: Path, categories: Sequence[str]) -> Path:
    """The Parquet file of Dolly's rows of some categories."""
    folder.mkdir()
    lines = [
        line for line in DOLLY.read_text(encoding="utf-8").splitlines() if json.loads(line)["category"] in categories
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_raw([SourceFile("rows.jsonl", folder / "rows.jsonl")], Columns(), folder)
    return folder / PARQUET


def prepared(folder: Path, parts: Sequence[RawPart], share: float) -> Path:
    folder.mkdir()
    data = configured(*SHAPE, f"data.replay={share}").data
    statistics = prepare_dataset(parts, load_tokenizer(str(STORIES)), data, "salt", folder)
    assert not share or abs(statistics.replayed_tokens / statistics.tokens - share) < 0.005
    return folder


def train(dataset: Path, config: ExperimentConfig, folder: Path, first_run: Path | None = None) -> LoraFinetune:
    output = folder / "output"
    output.mkdir(parents=True)
    job = TrainingPaths(STORIES, dataset, output, folder / "scratch", MADE_FROM, first_run)
    run = LoraFinetune(job, config, ALONE, Reporter(lambda line: None))
    run.run()
    return run


if __name__ == "__main__":
    main()
