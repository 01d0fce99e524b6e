"""Ratios of `benchmarks.train`: ours against the other recipes."""

from collections.abc import Callable, Iterable, Mapping

from benchmarks.train_candidates import is_peer
from finetune_assets.training.precision import INSTRUCTIONS, cpu_instructions

Table = Mapping[str, Mapping[str, float]]
"""Medians by recipe and figure."""
WORST: dict[str, Callable[[Iterable[float]], float]] = {
    "vs_reference": min,
    "vs_best_peer": min,
    "mfu": min,
    "bf16_vs_fp32": min,
    "rss_vs_hf_bf16": max,
    "rss_vs_best_peer": max,
}
"""Ratios with bars, and which one of several shapes is the worst."""


def ratios(table: Table, figure: str) -> dict[str, float]:
    """Ours against the others on one shape.

    `mfu` is that of float32 on a CPU. The best peer has the highest throughput, also for `rss_vs_best_peer`.
    """
    own = [name for name in ("e ours", "e ours, fp32", "e ours, bf16") if name in table]
    if not own:
        return {}
    best = max(own, key=lambda name: table[name][figure])
    ours, found = table[best], {"mfu": table[own[0]]["mfu"]}
    if "a reference" in table:
        found["vs_reference"] = ours[figure] / table["a reference"][figure]
        found["cost_per_token_vs_reference"] = 1 / found["vs_reference"]
    if peers := [name for name in table if is_peer(name)]:
        peer = table[max(peers, key=lambda name: table[name][figure])]
        found["vs_best_peer"] = ours[figure] / peer[figure]
        found["rss_vs_best_peer"] = ours["peak_memory_mib"] / peer["peak_memory_mib"]
    if "b HF Trainer" in table:
        found["rss_vs_hf_bf16"] = ours["peak_memory_mib"] / table["b HF Trainer"]["peak_memory_mib"]
    if {"e ours, fp32", "e ours, bf16"} <= table.keys():
        found["bf16_vs_fp32"] = table["e ours, bf16"][figure] / table["e ours, fp32"][figure]
    for kind in ("nf4", "int8", "compiled", "liger"):
        if f"e ours, {kind}" in table:
            found[f"{kind}_vs_bf16"] = table[f"e ours, {kind}"][figure] / ours[figure]
    return found


def summary(of_shapes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The worst value of each ratio over all shapes."""
    values = {name: [found[name] for found in of_shapes.values() if name in found] for name in WORST}
    return {name: WORST[name](numbers) for name, numbers in values.items() if numbers}


def bf16_reason() -> dict[str, str]:
    """Why there is no `bf16_vs_fp32`."""
    if cpu_instructions():
        reason = "not measured: --precision fp32 --precision bf16"
    else:
        reason = f"this CPU emulates bfloat16: no {' or '.join(INSTRUCTIONS)}"
    return {"bf16_vs_fp32_reason": reason}
