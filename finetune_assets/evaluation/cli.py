"""`python -m finetune_assets.evaluation --config ... --base-model DIR --adapter DIR --dataset DIR --output DIR ...`."""

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_assets.artifacts.layout import EVALUATION, HELD_BACK, PREFERENCES, ROWS
from finetune_assets.config.loading import load_resolved
from finetune_assets.data.ingest import PARQUET
from finetune_assets.data.rows import HoldoutRows
from finetune_assets.data.texts import read_texts
from finetune_assets.data.tokenization import Encoder
from finetune_assets.evaluation.compare import Comparison
from finetune_assets.evaluation.contenders import BASE, CHALLENGER, CHAMPION, Contender
from finetune_assets.retrieval.contexts import RowContexts
from finetune_assets.training import arguments
from finetune_assets.training.distributed import joined
from finetune_assets.training.reporting import reporter


def parser() -> argparse.ArgumentParser:
    parser = arguments.parser("finetune_assets.evaluation", __doc__)
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the tokenized dataset")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the challenger")
    parser.add_argument("--champion", type=Path, help="folder of the champion")
    parser.add_argument("--champion-base-model", type=Path, help="folder of the champion's base model, if it differs")
    parser.add_argument("--raw-N", metavar="DIR", help="folders of the raw data, if rows may have to be rendered again")
    parser.add_argument("--index", type=Path, help="folder of the index, for an experiment with data.retrieval")
    parser.add_argument("--general-text", type=Path, help="folder of general text that no adapter is trained on")
    parser.add_argument("--tasks", type=Path, help="folder of lm-evaluation-harness tasks")
    return parser


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Return the base, the challenger and, if given, the champion."""
    config = load_resolved(args.config)
    trusted = arguments.trusts(config, args.bases)
    models = [
        Contender(BASE, args.base_model, config, own_code=trusted),
        Contender(CHALLENGER, args.base_model, config, args.adapter, trusted),
    ]
    if args.champion:
        base_model = args.base_model
        if args.champion_base_model:
            base_model, trusted = args.champion_base_model, arguments.trusts(config, args.bases, "champion-base-model")
        models.append(Contender.of_folder(CHAMPION, base_model, args.champion, trusted))
    return models


def main() -> None:
    args, rest = parser().parse_known_args()
    raw = [folder / PARQUET for folder in arguments.numbered(rest, "raw")]  # one per source
    config = load_resolved(args.config)
    made_from = json.loads(args.made_from.read_text(encoding="utf-8"))
    holdout = HoldoutRows(**made_from[HELD_BACK]) if made_from[HELD_BACK] else None
    texts = read_texts(args.general_text) if args.general_text and config.evaluation.general_tokens else []
    models = contenders(args)
    contexts = None
    if config.data.retrieval:
        encoder = Encoder(models[0].tokenizer(), config.data)
        longest, salt = config.data.tokenization.cutoff_len, made_from["split_salt"]
        contexts = RowContexts(args.index, config.data.retrieval, salt, encoder, longest)
    with joined() as process, reporter(process) as log:
        comparison = Comparison(
            config, args.dataset, made_from["split"], texts, raw, log.write_line, args.tasks, holdout, contexts
        )
        comparison.run(models, process.device)
        result = comparison.result()
        for name, metrics in result["contenders"].items():
            log.write_line(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    pq.write_table(pa.table(comparison.table()), args.output / ROWS)
    if preferences := comparison.preferences:
        pq.write_table(pa.table(preferences.table()), args.output / PREFERENCES)
    (args.output / EVALUATION).write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
