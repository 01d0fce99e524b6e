"""Properties of GPUs that are known by name."""

MEMORY_GIB = {
    "B200": 178, "H200": 140, "H100": 79, "A100": 79, "A40": 44, "L40": 44, "L4": 22, "A10": 22, "A6000": 47,
    "RTX 6000": 47, "RTX 5090": 31, "RTX 4090": 23.5, "RTX 3090": 23.5, "V100": 15.5, "T4": 14.5,
}  # fmt: skip
"""Memory in GiB as shown by `nvidia-smi`, rounded down, by part of the name; for several sizes, the most common one."""
WITHOUT_BF16 = ("V100", "T4", "P100", "RTX 20")
"""Parts of the names of GPUs without bfloat16 support."""


def memory_gib(name: str) -> float | None:
    """Memory of one GPU in GiB; None if the name is unknown."""
    return next((size for part, size in MEMORY_GIB.items() if part in name.upper()), None)


def computes_in_bf16(name: str) -> bool:
    return not any(part in name.upper() for part in WITHOUT_BF16)
