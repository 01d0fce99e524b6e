"""Small pictures of what was found: plain functions from numbers to matplotlib figures, in one style."""
