from finetune_assets.launch.process import run_worker

run_worker("finetune_assets.preflight.cli")
