"""Base models in GGUF files: their header, their tokenizer, and their weights as safetensors."""
