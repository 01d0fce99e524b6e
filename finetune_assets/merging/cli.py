"""`python -m finetune_assets.merging --config FILE --base-model DIR --adapter DIR --dataset DIR ...`.

Merges an adapter into its base model, and compares the logits of the merged model with those of base plus adapter.
"""

import argparse
import json
from pathlib import Path

from finetune_assets.artifacts.layout import MERGE
from finetune_assets.config.loading import load_resolved
from finetune_assets.evaluation.contenders import Contender
from finetune_assets.evaluation.rows import held_out
from finetune_assets.merging.exports import export_all
from finetune_assets.merging.gguf import check_exportable
from finetune_assets.merging.merge import compare, merged, positions, reference
from finetune_assets.training import arguments
from finetune_assets.training.distributed import joined
from finetune_assets.training.reporting import reporter


def parser() -> argparse.ArgumentParser:
    parser = arguments.parser("finetune_assets.merging", __doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of a tokenized dataset")
    return parser


def main() -> None:
    args = parser().parse_args()
    config = load_resolved(args.config)
    assert config.merge is not None
    contender = Contender.of_folder("adapter", args.base_model, args.adapter, arguments.trusts(config, args.bases))
    with joined() as process, reporter(process) as log:
        held_out_rows = held_out(args.dataset, "val", config.data)
        rows = positions(held_out_rows, config.merge.compared_rows)
        log.write_line(f"Computing logits of base plus adapter on {len(rows)} held-out rows")
        expected = reference(contender, rows, process.device)
        if config.merge.gguf:
            check_exportable(args.base_model, contender.tokenizer())
        log.write_line(f"Merging into the base model (onto: {config.merge.onto}) in {config.merge.dtype}")
        merged(contender, config.merge, args.output)
        difference = compare(args.output, rows, expected, process.device, contender.own_code)
        log.write_line(str(difference))
        exports = export_all(args.output, contender, config.merge, held_out_rows, rows, expected, process.device)
        for name, of_file in exports.items():
            log.write_line(f"{name}: {of_file}")
    result = {**difference.to_dict(), "onto": config.merge.onto, "dtype": config.merge.dtype}
    result["quantization"] = contender.config.model.quantization
    if exports:
        result["gguf"] = {name: of_file.to_dict() for name, of_file in exports.items()}
    (args.output / MERGE).write_text(json.dumps(result, indent=1), encoding="utf-8")
