"""Rebroadcasting: parts in, student out."""
