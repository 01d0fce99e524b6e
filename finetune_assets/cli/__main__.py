"""`python -m finetune_assets.cli`: the same as `finetune`."""

from finetune_assets.cli.main import finetune

finetune(prog_name="finetune")
