"""`torchrun -m finetune_assets.training --config resolved.yaml --base-model DIR --dataset DIR --output DIR ...`."""

import argparse
import json
from pathlib import Path

from finetune_assets.config.loading import load_resolved
from finetune_assets.training import arguments
from finetune_assets.training.distributed import joined
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import reporter
from finetune_assets.training.state import TrainingPaths
from finetune_assets.training.trackers import TrackedTraining


def parser() -> argparse.ArgumentParser:
    parser = arguments.parser("finetune_assets.training", __doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the tokenized dataset")
    parser.add_argument("--warm-start", type=Path, help="folder of the adapter for a warm start")
    parser.add_argument("--reference", type=Path, help="folder of the adapter that judged answers are compared with")
    parser.add_argument("--reference-log-probs", type=Path, help="folder of the reference's log-probabilities")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints, kept until success")
    return parser


def main() -> None:
    args = parser().parse_args()
    config = load_resolved(args.config)
    made_from = json.loads(args.made_from.read_text(encoding="utf-8"))
    uris = json.loads(args.uris.read_text(encoding="utf-8")) if args.uris else {}
    trusted = arguments.trusts(config, args.bases)
    references = args.reference, args.reference_log_probs
    folders = args.base_model, args.dataset, args.output, args.scratch
    job = TrainingPaths(*folders, made_from, args.warm_start, trusted, *references)
    with joined() as process, reporter(process, TrackedTraining(config, made_from, uris)) as run_reporter:
        LoraFinetune(job, config, process, run_reporter).run()
