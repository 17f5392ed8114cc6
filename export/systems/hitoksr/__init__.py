"""HiTokSR: x4 in one pass."""
