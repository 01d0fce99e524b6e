"""LoRA training on one GPU, in parts: `python -m benchmarks.train --device cuda [--part NAME] [--out FOLDER]`.

    peers       ours, the Hugging Face Trainer, TRL and LLaMA-Factory
    kernels     ours with PyTorch's kernels, with liger-kernel, and compiled
    quantized   ours in bfloat16, nf4 and int8, and the reference example

Without `--part` all run, one after the other, in ten minutes; a part ends within `PART_SECONDS`. Each writes
`FOLDER/PART.json`: of every side the tokens per second, MFU, peak memory, loss and grad_norm, and the ratios. MFU
counts 4N operations a token, for the base model is frozen (2N forward, 2N for the gradient of the activations), over
the data sheet's dense 16-bit rate; attention, the adapter and recomputation are not counted.

`benchmarks/gpu.sh` runs this, also on a machine that no package can be downloaded to.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import train_subject
from benchmarks.harness import median, report
from benchmarks.train_candidates import fastest
from benchmarks.train_parts import PART_SECONDS, PARTS, Deadline, Recipes
from finetune_assets.training.telemetry import CONVENTION

SHAPE, LENGTH, EXAMPLES, STEPS = "llama-3-8b", 4096, 600, 6
FIGURES = ("tokens_per_s", "mfu", "peak_memory_mib", "loss", "grad_norm", "tokens", "steps")
Figures = dict[str, Any]
Run = Callable[..., Figures | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments for CUDA."""
    parser.add_argument("--part", choices=PARTS, help="with --device cuda: run only this part")
    parser.add_argument("--out", type=Path, help="with --device cuda: folder for a JSON file of each part")


def main(args: argparse.Namespace, run: Run, ratios: Callable[..., dict[str, float]]) -> None:
    """Run the parts.

    Args:
        args: The command line of `benchmarks.train`.
        run: Runs a recipe in a process of its own.
        ratios: Computes the ratios of a table.
    """
    shape = args.shape[0] if args.shape else SHAPE
    examples, steps = (60, 3) if args.quick else (EXAMPLES, STEPS)
    ratios_of_parts: dict[str, dict[str, float]] = {}
    deadline = Deadline(PART_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        subject = train_subject.make(Path(folder), shape, args.rows, examples, LENGTH, steps, "cuda")
        file = Path(folder) / "subject.json"
        subject.write(file)
        print(f"subject: {shape}, {examples} examples, made in {time.monotonic() - deadline.began:.0f} s", flush=True)
        for name in [args.part] if args.part else PARTS:
            began = time.monotonic()
            side = measured(selected(PARTS[name], args), file, 1 if args.quick else args.runs, run, deadline)
            result = summary(side, ratios)
            result |= {"part": name, "shape": shape, "examples": examples, "rows": str(args.rows)}
            result |= {"seconds": round(time.monotonic() - began, 1), "left_out": deadline.left_out}
            ratios_of_parts[name] = result["ratios"]
            show(result, args.json and args.part is not None)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"{name}.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
            deadline = Deadline(PART_SECONDS)
    if args.json and not args.part:
        print(json.dumps(ratios_of_parts))


def selected(recipes: Recipes, args: argparse.Namespace) -> Recipes:
    """The sides of a part that the command line selects, with one of their settings for `--quick`."""
    kept = {name: side for name, side in recipes.items() if not args.only or name[0] in args.only}
    return {name: (recipe, tried[:1] if args.quick else tried) for name, (recipe, tried) in kept.items()}


def measured(recipes: Recipes, subject: Path, runs: int, run: Run, deadline: Deadline) -> dict[str, list[Figures]]:
    """Run each setting of each side once, and the best setting of each in turn until it has `runs` runs."""
    best: dict[str, list[Figures]] = {}
    for name, (recipe, tried) in recipes.items():
        found = []
        for settings in tried:
            figures = deadline.run(
                f"{name} {settings}", lambda limit, s=settings, r=recipe: run(r, subject, s, "cuda", limit)
            )
            if figures:
                print(f"  {name} {settings}: {figures['tokens_per_s']:,.0f} tokens/s", flush=True)
                found.append(figures)
        if found:
            best[name] = [fastest(found, "tokens_per_s")]
    for number in range(1, runs):
        for name, done in best.items():
            recipe, settings = recipes[name][0], done[0]["settings"]
            figures = deadline.run(
                f"{name}, run {number + 1}", lambda limit, s=settings, r=recipe: run(r, subject, s, "cuda", limit)
            )
            if figures:
                done.append(figures)
    return best


def summary(sides: dict[str, list[Figures]], ratios: Callable[..., dict[str, float]]) -> Figures:
    """Medians of each side, and ratios."""
    every = [figures for runs in sides.values() for figures in runs]
    peak = max((figures["peak_flops"] for figures in every), default=0.0)
    for figures in every:
        figures["mfu"] = figures["flops"] / peak
    table = {name: {figure: median(runs, figure) for figure in FIGURES} for name, runs in sides.items()}
    described = {
        name: {**table[name], "settings": runs[0]["settings"], "runs": len(runs)} for name, runs in sides.items()
    }
    found = {name.replace("rss_", "memory_"): ratio for name, ratio in ratios(table, "tokens_per_s").items()}
    return {
        "hardware": every[0]["hardware"] if every else None,
        "peak_tflops": peak / 1e12,
        "mfu_convention": CONVENTION.format(peak=f"{peak / 1e12:,.0f} TFLOP/s"),
        "sides": described,
        "ratios": found,
    }


def show(result: Figures, as_json: bool) -> None:
    """Print the table of a part."""
    rows = [
        (
            f"{name} {json.dumps(side['settings'])}",
            f"{side['tokens_per_s']:,.0f} tokens/s, MFU {side['mfu']:.1%}, {side['peak_memory_mib']:,.0f} MiB, "
            f"loss {side['loss']:.3f}, grad_norm {side['grad_norm']:.3f}, {side['runs']} runs",
        )
        for name, side in result["sides"].items()
    ]
    title = f"{result['part']}: {result['shape']} on {result['hardware']}, {result['seconds']:.0f} s"
    report(title, rows, result["ratios"], as_json)
    for name in result["left_out"]:
        print(f"  not run, for want of time: {name}")
