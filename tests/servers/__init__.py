"""Servers of our own on loopback, for clients that are real."""
