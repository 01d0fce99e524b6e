"""LoRA training against its peers, interleaved in one call: `python -m benchmarks.train --device cpu`.

Same random model, same real rows, same adapter, same global batch in tokens; one epoch, of which the first step is not
counted. Recipes: (a) the reference example's on today's libraries, (b) the Hugging Face Trainer, (c) TRL's SFTTrainer,
(d) LLaMA-Factory, (e) ours. (b) to (d) are first run once with each of their settings below, and go on with the best of
them. Peers live in environments of their own: `python -m benchmarks.peers`; one that is not there is left out.

On CUDA the comparison has parts, each of which ends within four minutes: see `benchmarks.train_gpu`.

MFU is 4N floating point operations a token (frozen base; attention and adapter not counted) over the device's rate: on
a CPU the fastest matrix multiplication that any of the processes measured on its one thread.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_gpu, train_subject
from benchmarks.bf16_ratio import BF16 as OURS_BF16
from benchmarks.bf16_ratio import FP32 as OURS_FP32
from benchmarks.bf16_ratio import bf16_ratio, precisions
from benchmarks.harness import ROOT, arguments, interleaved, median, report
from benchmarks.peers import PEERS, python_of
from finetune_assets.sources.local import SAMPLE

ROWS = ROOT.parent / "shared" / "data" / "dolly" / "databricks-dolly-15k.jsonl"
REFERENCE = {
    "quantization": "int8",
    "checkpointing": True,
    "by_length": False,
    "rank": 8,
    "targets": ["q_proj", "v_proj"],
}
HAS_BF16 = "bf16" in precisions("cpu")
"""On a CPU without instructions for it, bfloat16 is ten times slower than float32."""
BF16 = [{"micro": 8, "bf16": True}] if HAS_BF16 else []
BOTH: dict[str, tuple[str, list[dict[str, Any]]]] = {
    name: ("ours", [{"micro": 2, "precision": precision}])
    for name, precision in ((OURS_FP32, "fp32"), (OURS_BF16, "bf16"))
}
"""Ours in either precision; on other devices, ours is in float32."""
CANDIDATES: dict[str, dict[str, tuple[str, list[dict[str, Any]]]]] = {
    "cpu": {
        "a reference": ("hf", [{**REFERENCE, "micro": 4}]),
        "b HF Trainer": ("hf", [{"micro": 2}, {"micro": 4}, {"micro": 8}, *BF16]),
        "c TRL": ("trl", [{"micro": 2}, {"micro": 4}, {"micro": 8}, {"micro": 4, "packing": True}]),
        "d LLaMA-Factory": ("llamafactory", [{"micro": 2}, {"micro": 4}, {"micro": 8}]),
        "e ours": ("ours", [{"micro": 2}]),
        **(BOTH if HAS_BF16 else {}),
    },
}
"""Of each recipe: the module that runs it, and the settings that are tried."""
SIZES = {"cpu": ("13m", 512, 160, 5)}
"""Shape of the model, longest example, examples, steps."""


def run(
    recipe: str, subject: Path, settings: dict[str, Any], device: str, limit_s: float | None = None
) -> dict[str, Any] | None:
    """One side in a process of its own; None, with the reason told, if it does not run here or not within `limit_s`."""
    python = interpreter(recipe)
    if not python:
        print(f"  {recipe}: not installed (python -m benchmarks.peers)", file=sys.stderr)
        return None
    packages = os.environ.get("PYTHONPATH") if python == Path(sys.executable) else None
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([packages] if packages else [])]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), "-m", f"benchmarks.train_recipes.{recipe}", str(subject), json.dumps(settings)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT, timeout=limit_s
        )
    except subprocess.TimeoutExpired as e:
        print(f"  {recipe} {settings}: ended after {e.timeout:.0f} s: the time of the part is over", file=sys.stderr)
        return None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        print(f"  {recipe} {settings}: does not run here: {said}", file=sys.stderr)
        return None
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**figures, "settings": settings}


def interpreter(recipe: str) -> Path | None:
    """The Python of a recipe: a peer's own environment, or this one if it has the peer's package; None without it."""
    own = Path(sys.executable)
    if recipe not in PEERS:
        return own
    return python_of(recipe) if python_of(recipe).exists() else own if find_spec(recipe) else None


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=train_subject.SHAPES, help="of the model")
    parser.add_argument("--rows", type=Path, default=ROWS if ROWS.exists() else SAMPLE, help="JSON Lines of rows")
    parser.add_argument("--only", help="recipes to run, by their letters, such as be")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="also draw the table, as SVG or PNG (pip install matplotlib)")
    train_gpu.add_arguments(parser)
    args = parser.parse_args()
    if args.device == "cuda":
        train_gpu.main(args, run, ratios)
        return
    shape, length, examples, steps = SIZES[args.device]
    if args.quick:
        examples, steps, args.runs = 60, 3, 1
    figure = "tokens_per_cpu_s"
    with tempfile.TemporaryDirectory() as folder:
        subject = train_subject.make(Path(folder), args.shape or shape, args.rows, examples, length, steps, args.device)
        where = Path(folder) / "subject.json"
        subject.write(where)
        best: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, (recipe, candidates) in CANDIDATES[args.device].items():
            if args.only and name[0] not in args.only:
                continue
            tried = candidates[:1] if args.quick else candidates
            found = [made for settings in tried if (made := run(recipe, where, settings, args.device))]
            for one in found:
                print(f"  {name} {one['settings']}: {one[figure]:,.0f} tokens", flush=True)
            if found:
                best[name] = (recipe, max(found, key=lambda made: made[figure])["settings"])
        sides = {name: lambda side=side: run(side[0], where, side[1], args.device) or {} for name, side in best.items()}
        measured = interleaved(sides, args.runs)  # type: ignore[arg-type]
    every = [made for runs in measured.values() for made in runs]
    peak = max(made["peak_flops"] for made in every)
    for made in every:
        made["mfu"] = made["flops"] / peak
    figures_told = ("tokens_per_s", "tokens_per_cpu_s", "mfu", "peak_memory_mib", "loss", "grad_norm")
    table = {name: {key: median(runs, key) for key in figures_told} for name, runs in measured.items()}
    rows = [
        (
            f"{name} {json.dumps(best[name][1])}",
            f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['tokens_per_cpu_s']:,.0f} a CPU-second, "
            f"MFU {figures['mfu']:.1%}, {figures['peak_memory_mib']:,.0f} MiB, loss {figures['loss']:.3f}, "
            f"grad_norm {figures['grad_norm']:.3f}",
        )
        for name, figures in table.items()
    ]
    title = f"{args.shape or shape} on {args.device}, median of {args.runs}, MFU of {peak / 1e9:,.0f} GFLOP/s"
    report(title, rows, {**ratios(table, figure), **bf16_ratio(table, figure, args.device)}, args.json)
    if args.plot:
        draw(table, figure, args.plot)


def ratios(table: dict[str, dict[str, float]], figure: str) -> dict[str, float]:
    """Ours against the others."""
    if "e ours" not in table:
        return {}
    ours = table["e ours"]
    found = {"mfu": ours["mfu"]}
    if "a reference" in table:
        found["vs_reference"] = ours[figure] / table["a reference"][figure]
        found["cost_per_token_vs_reference"] = 1 / found["vs_reference"]
    if peers := [table[name][figure] for name in table if name[0] in "bcd"]:
        found["vs_best_peer"] = ours[figure] / max(peers)
    if "b HF Trainer" in table:
        found["rss_vs_hf_bf16"] = ours["peak_memory_mib"] / table["b HF Trainer"]["peak_memory_mib"]
    for kind in ("nf4", "int8", "compiled", "liger"):
        if f"e ours, {kind}" in table:
            found[f"{kind}_vs_bf16"] = table[f"e ours, {kind}"][figure] / ours[figure]
    return found


def draw(table: dict[str, dict[str, float]], figure: str, path: Path) -> None:
    """Bars of speed and of memory, a recipe each."""
    import matplotlib.pyplot as plt

    shown, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(table) + 1.2), sharey=True)
    names = list(table)[::-1]
    for axis, key, title in zip(
        axes, (figure, "peak_memory_mib"), ("tokens a second", "peak memory, MiB"), strict=True
    ):
        colours = ["#4f43dd" if name.startswith("e") else "#9aa0a6" for name in names]
        axis.bar_label(axis.barh(names, [table[name][key] for name in names], color=colours), fmt="{:,.0f}", padding=3)
        axis.set_title(title)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    shown.tight_layout()
    shown.savefig(path)


if __name__ == "__main__":
    main()
