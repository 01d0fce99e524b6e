"""Serving the champion: what servers support, the adapters that they load, verification, alias and rollback."""
