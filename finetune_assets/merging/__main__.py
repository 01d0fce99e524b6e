from finetune_assets.worker.process import run_worker

run_worker("finetune_assets.merging.cli")
