"""What runs under torchrun: reads one resolved config file and local folders, writes one folder.

Knows nothing of Dagster beyond the Pipes channel, and runs without it installed.
"""
