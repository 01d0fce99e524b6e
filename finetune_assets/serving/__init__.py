"""Adapters on servers: which settings a server supports, and the form of an adapter that it computes correctly."""
