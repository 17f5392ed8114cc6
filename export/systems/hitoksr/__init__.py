"""HiTokSR: x4 super-resolution in one pass."""
