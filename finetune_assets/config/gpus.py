"""GPUs that are known by name."""

MEMORY_GIB = {
    "B200": 178, "H200": 140, "H100": 79, "A100": 79, "A40": 44, "L40": 44, "L4": 22, "A10": 22, "A6000": 47,
    "RTX 6000": 47, "RTX 5090": 31, "RTX 4090": 23.5, "RTX 3090": 23.5, "V100": 15.5, "T4": 14.5,
}  # fmt: skip
"""What `nvidia-smi` shows, rounded down, by a part of the name; of a kind with several sizes the usual one."""
WITHOUT_BF16 = ("V100", "T4", "P100", "RTX 20")
"""Parts of the names of those that do not compute in bfloat16."""


def memory_gib(name: str) -> float | None:
    """Of one GPU; None if it is not known by that name."""
    return next((size for part, size in MEMORY_GIB.items() if part in name.upper()), None)


def computes_in_bf16(name: str) -> bool:
    return not any(part in name.upper() for part in WITHOUT_BF16)
