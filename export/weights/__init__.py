"""Weights: their places in the user's files, and writing new files."""
