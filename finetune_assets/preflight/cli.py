"""`python -m finetune_assets.preflight --config resolved.yaml --base-model DIR --dataset DIR --states FILE ...`."""

import argparse
import json
from pathlib import Path

from finetune_assets.artifacts.layout import PLAN
from finetune_assets.config.loading import load_resolved
from finetune_assets.preflight.plan import make_plan, read_shape


def main() -> None:
    parser = argparse.ArgumentParser(prog="finetune_assets.preflight", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration")
    parser.add_argument("--base-model", type=Path, required=True, help="folder of the base model's config.json")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the tokenized dataset")
    parser.add_argument(
        "--states", type=Path, required=True, help="JSON file with the trainer states of earlier training runs"
    )
    parser.add_argument("--results", type=Path, required=True, help="folder of cached simulation results")
    parser.add_argument("--output", type=Path, required=True, help="folder for the plan")
    args = parser.parse_args()
    config = load_resolved(args.config)
    states = json.loads(args.states.read_text(encoding="utf-8"))
    plan = make_plan(read_shape(args.base_model, config, args.results), config, args.dataset, states)
    (args.output / PLAN).write_text(json.dumps(plan.to_dict()), encoding="utf-8")
