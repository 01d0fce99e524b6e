"""Experiments and their latest runs, from the store alone: collected, compared, and shown on one page."""
