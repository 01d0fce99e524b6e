"""Tools that write the documentation's pictures and build its site."""
