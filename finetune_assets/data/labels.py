"""Label values of tokens."""

IGNORED = -100
"""Label of tokens excluded from the loss; the default `ignore_index` of PyTorch's cross-entropy and of all trainers."""
