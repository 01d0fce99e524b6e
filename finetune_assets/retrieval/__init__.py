"""Retrieval: passages of documents, the index that finds them, and golden passages of rows."""
