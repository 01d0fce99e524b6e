"""Ratios measured side by side: `python -m benchmarks.NAME [--quick] [--json]`.

Each prints its figures, and with `--json` its ratios by name as one JSON object on the last line. Sides are run in turn
within one call, so that a machine whose speed drifts favours neither. Results are kept in RESULTS.md.
"""
