"""New instruction data in; validated, evaluated, traceable LoRA adapters out, for every configured experiment."""
