"""`torchrun -m finetune_assets.training --config resolved.yaml --base-model DIR --dataset DIR --output DIR ...`."""

import argparse
import json
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from finetune_assets.config.loading import load_resolved
from finetune_assets.launch.process import die_with_parent
from finetune_assets.training.distributed import joined
from finetune_assets.training.recipe import Job, LoraFinetune
from finetune_assets.training.reporting import reporter


@record
def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="finetune_assets.training", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration")
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the tokenized dataset")
    parser.add_argument("--output", type=Path, required=True, help="empty folder for the adapter")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--made-from", type=Path, required=True, help="JSON file that names the inputs")
    parser.add_argument("--warm-start", type=Path, help="folder of an adapter to begin from")
    args = parser.parse_args()

    config = load_resolved(args.config)
    made_from = json.loads(args.made_from.read_text(encoding="utf-8"))
    job = Job(args.base_model, args.dataset, args.output, args.checkpoints, made_from, args.warm_start)
    with joined() as process, reporter(process, config, made_from["fingerprint"][:32]) as voice:
        LoraFinetune(job, config, process, voice).run()


if __name__ == "__main__":
    main()
