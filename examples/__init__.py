"""Whole programs that run on a laptop."""
