"""LoRA training against its peers, interleaved: `python -m benchmarks.train --device cpu`.

Same random model, same real rows, same adapter, same global batch in tokens; one epoch, of which the first step is not
counted. Recipes: (a) the reference example's on today's libraries, (b) the Hugging Face Trainer, (c) TRL's SFTTrainer,
(d) LLaMA-Factory, (e) ours. (b) to (e) first run a few steps with each of the settings in `train_candidates`, and the
fastest is measured. Ours may not take more memory for it than the fastest peer takes: of its settings, the fastest
within that peer's peak is measured. Peers have environments of their own: `python -m benchmarks.peers`. One that is not
installed or does not run is named in the JSON object under `missing`, with the reason.

On CUDA the comparison has parts, each of which ends within four minutes: see `benchmarks.train_gpu`.

MFU is 4N floating point operations a token (frozen base; attention and adapter not counted) over the device's rate in
the same precision: on a CPU the fastest matrix multiplication that any of the processes measured on its one thread.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import train_gpu, train_subject
from benchmarks.harness import ROOT, arguments, interleaved, median, report
from benchmarks.peers import PEERS, is_installed, python_of
from benchmarks.train_candidates import PRECISIONS, SIZES, Recipe, candidates, fastest, is_ours, is_peer
from benchmarks.train_ratios import bf16_reason, ratios, summary
from finetune_assets.sources.local import SAMPLE

ROWS = ROOT.parent / "shared" / "data" / "dolly" / "databricks-dolly-15k.jsonl"
FIGURES = ("tokens_per_s", "tokens_per_cpu_s", "mfu", "peak_flops", "peak_memory_mib", "loss", "grad_norm")
Measurement = dict[str, Any]


class DoesNotRun(Exception):
    """A recipe does not run here."""


def run(recipe: str, subject: Path, settings: dict[str, Any], device: str, limit_s: float | None = None) -> Measurement:
    """One side in a process of its own.

    Raises:
        DoesNotRun: with the reason, if it does not run here or not within `limit_s`.
    """
    python = interpreter(recipe)
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
        raise DoesNotRun(f"ended after {e.timeout:.0f} s: the time of the part is over") from e
    if done.returncode:
        raise DoesNotRun((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    figures: Measurement = json.loads(done.stdout.strip().splitlines()[-1])
    return {**figures, "settings": settings}


def run_or_none(*arguments: Any) -> Measurement | None:
    """As `run`; None, with the reason printed, if it does not run."""
    try:
        return run(*arguments)
    except DoesNotRun as e:
        print(f"  {arguments[0]} {arguments[2]}: does not run here: {e}", file=sys.stderr)
        return None


def interpreter(recipe: str) -> Path:
    """The Python of a recipe: a peer's own environment, or this one if it has the peer's package.

    Raises:
        DoesNotRun: if the peer is not installed.
    """
    own, peer = Path(sys.executable), recipe.partition("_")[0]
    if peer not in PEERS or is_installed(peer):
        return own if peer not in PEERS else python_of(peer)
    if find_spec(peer):
        return own
    raise DoesNotRun(f"not installed: python -m benchmarks.peers {peer}")


def best_settings(
    name: str,
    recipe: Recipe,
    subject: Path,
    device: str,
    steps: int,
    figure: str,
    most_mib: float | None = None,
) -> Measurement:
    """The measurement of a few steps with a recipe's best settings.

    Args:
        name: Name of the recipe, for messages.
        recipe: The recipe.
        subject: What is trained.
        device: `cpu` or `cuda`.
        steps: Number of steps.
        figure: Throughput that decides.
        most_mib: Peak memory beyond which settings are not chosen, if there are others.

    Raises:
        DoesNotRun: if it runs with none of them.
    """
    found: list[Measurement] = []
    reason = ""
    for settings in recipe.candidates:
        try:
            measured = run(recipe.module, subject, {**settings, "steps": steps}, device)
        except DoesNotRun as e:
            reason = str(e)
            print(f"  {name} {settings}: does not run here: {reason}", file=sys.stderr)
            continue
        found.append({**measured, "settings": settings})
        memory = f"{measured['peak_memory_mib']:,.0f} MiB"
        print(f"  {name} {settings}: {measured[figure]:,.0f} tokens, {memory}", flush=True)
    if not found:
        raise DoesNotRun(reason)
    return fastest(found, figure, most_mib)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=train_subject.SHAPES, action="append", help="of the model; may be repeated")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append", help="on a CPU; may be repeated")
    parser.add_argument("--rows", type=Path, default=ROWS if ROWS.exists() else SAMPLE, help="JSON Lines of rows")
    parser.add_argument("--only", help="recipes to run, by their letters, such as be")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="also draw the table of each shape, as SVG or PNG")
    train_gpu.add_arguments(parser)
    args = parser.parse_args()
    if args.device == "cuda":
        train_gpu.main(args, run_or_none, ratios)
        return
    args.runs = 1 if args.quick else args.runs
    args.precision = args.precision or PRECISIONS
    figure = "tokens_per_cpu_s"
    of_shapes: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    for shape in args.shape or SIZES:
        table, best = compared(shape, args, figure, missing)
        of_shapes[shape] = ratios(table, figure)
        title = f"{shape} on {args.device}, median of {args.runs}"
        report(title, _lines(table, best), of_shapes[shape], as_json=False)
        if args.plot:
            draw(table, figure, args.plot.with_stem(f"{args.plot.stem}-{shape}"))
    for name, reason in missing.items():
        print(f"  {name} is missing: {reason}")
    if args.json:
        found = {**summary(of_shapes), "shapes": of_shapes, "missing": missing, "precisions": args.precision}
        print(json.dumps(found if "bf16_vs_fp32" in found else {**found, "bf16_vs_fp32": None, **bf16_reason()}))


def compared(
    shape: str, args: Any, figure: str, missing: dict[str, str]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """Measure all recipes on a shape; medians by recipe and figure, and the settings of each recipe.

    Args:
        shape: Name in `train_subject.SHAPES`.
        args: The command line.
        figure: Throughput that decides.
        missing: Reasons of recipes that do not run; more are added.

    Raises:
        DoesNotRun: if ours does not run.
    """
    size = SIZES.get(shape) or [*SIZES.values()][-1]
    size = size.quick() if args.quick else size
    with tempfile.TemporaryDirectory() as folder:
        subject = train_subject.make(
            Path(folder), shape, args.rows, size.examples, size.length, size.steps, args.device
        )
        where = Path(folder) / "subject.json"
        subject.write(where)
        best: dict[str, Measurement] = {}
        recipes = candidates(args.precision)
        for name, recipe in recipes.items():
            if args.only and name[0] not in args.only:
                continue
            tried = recipe.first() if args.quick else recipe
            limit = memory_of_fastest_peer(best, figure) if is_ours(name) else None
            try:
                best[name] = best_settings(name, tried, where, args.device, size.tried_steps, figure, limit)
            except DoesNotRun as e:
                if is_ours(name):
                    raise
                missing[name] = f"{shape}: {e}"
        settings: dict[str, dict[str, Any]] = {name: measured["settings"] for name, measured in best.items()}
        sides = {name: partial(run, recipes[name].module, where, settings[name], args.device) for name in best}
        measured = interleaved(sides, args.runs)
    every = [made for runs in measured.values() for made in runs]
    peaks = {made["precision"]: 0.0 for made in every}
    for made in every:
        peaks[made["precision"]] = max(peaks[made["precision"]], made["peak_flops"])
    for made in every:
        made["peak_flops"] = peaks[made["precision"]]
        made["mfu"] = made["flops"] / made["peak_flops"]
    table = {name: {key: median(runs, key) for key in FIGURES} for name, runs in measured.items()}
    return table, settings


def memory_of_fastest_peer(tried: Mapping[str, Measurement], figure: str) -> float | None:
    """Peak memory in MiB of the fastest of the peers that were tried; None without peers."""
    peers = [measured for name, measured in tried.items() if is_peer(name)]
    return fastest(peers, figure)["peak_memory_mib"] if peers else None


def _lines(table: dict[str, dict[str, float]], best: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(f"{name} {json.dumps(best[name])}", _line(figures)) for name, figures in table.items()]


def _line(figures: dict[str, float]) -> str:
    return (
        f"{figures['tokens_per_s']:,.0f} tokens/s, {figures['tokens_per_cpu_s']:,.0f} a CPU-second, "
        f"MFU {figures['mfu']:.1%} of {figures['peak_flops'] / 1e9:,.0f} GFLOP/s, "
        f"{figures['peak_memory_mib']:,.0f} MiB, loss {figures['loss']:.3f}, grad_norm {figures['grad_norm']:.3f}"
    )


def draw(table: dict[str, dict[str, float]], figure: str, path: Path) -> None:
    """Bars of speed and of memory, a recipe each."""
    import matplotlib.pyplot as plt

    shown, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(table) + 1.2), sharey=True)
    names = list(table)[::-1]
    for axis, key, title in zip(
        axes, (figure, "peak_memory_mib"), ("tokens a second", "peak memory, MiB"), strict=True
    ):
        colours = ["#4f43dd" if is_ours(name) else "#9aa0a6" for name in names]
        axis.bar_label(axis.barh(names, [table[name][key] for name in names], color=colours), fmt="{:,.0f}", padding=3)
        axis.set_title(title)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    shown.tight_layout()
    shown.savefig(path)


if __name__ == "__main__":
    main()
