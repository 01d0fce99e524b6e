"""Training worker started by torchrun: reads one resolved config file and local folders, writes one output folder.

Uses Dagster only for the Pipes channel, and runs without Dagster installed.
"""
