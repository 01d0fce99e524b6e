"""Serving the champion: what servers support, the form of an adapter that they load, verification, alias and rollback."""
