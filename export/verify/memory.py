"""The memory that a verification needs."""

__all__ = ["VERIFY_COPIES"]

VERIFY_COPIES = 6  # copies of float32 weights in memory: mapped, re-packed by one engine, eager, and eager in float64
