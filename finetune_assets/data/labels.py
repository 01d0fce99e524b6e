"""What the label of a token says."""

IGNORED = -100
"""Label of a token that is not learned, as PyTorch's cross-entropy and every trainer know it."""
