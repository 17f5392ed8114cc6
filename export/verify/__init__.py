"""Verifying a bundle: its engines against eager PyTorch, and the seams of its tiles."""
