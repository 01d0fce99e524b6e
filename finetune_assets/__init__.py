"""Trains validated, evaluated and traceable LoRA adapters on new instruction data, for each configured experiment."""
