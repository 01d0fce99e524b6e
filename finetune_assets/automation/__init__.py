"""What happens without a human: what starts by itself, when, and whom it tells."""
