"""How much memory a verification takes."""

__all__ = ["VERIFY_COPIES"]

VERIFY_COPIES = 6  # of float32 weights: mapped, re-packed by the engine, eager, and float64 eager, which is two
