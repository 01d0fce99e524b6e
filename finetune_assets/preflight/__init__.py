"""Estimate memory, steps, tokens, hours and cost of a training run before it starts."""
