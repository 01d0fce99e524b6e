"""`torchrun -m finetune_assets.training --config resolved.yaml --base-model DIR --dataset DIR --output DIR ...`."""

import argparse
import json
from pathlib import Path

from finetune_assets.config.loading import load_resolved
from finetune_assets.training.distributed import joined
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import reporter
from finetune_assets.training.state import Job


def main() -> None:
    parser = argparse.ArgumentParser(prog="finetune_assets.training", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration")
    parser.add_argument("--made-from", type=Path, required=True, help="JSON file that names the inputs")
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the tokenized dataset")
    parser.add_argument("--warm-start", type=Path, help="folder of an adapter to begin from")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for checkpoints, kept until success")
    parser.add_argument("--output", type=Path, required=True, help="empty folder for the adapter")
    args = parser.parse_args()

    config = load_resolved(args.config)
    made_from = json.loads(args.made_from.read_text(encoding="utf-8"))
    job = Job(args.base_model, args.dataset, args.output, args.scratch, made_from, args.warm_start)
    with (
        joined() as process,
        reporter(process, config, made_from["experiment"], made_from["fingerprint"][:32]) as voice,
    ):
        LoraFinetune(job, config, process, voice).run()
