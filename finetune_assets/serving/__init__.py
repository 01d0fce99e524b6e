"""Serving the champion: servers, verification by numbers, alias and rollback."""
