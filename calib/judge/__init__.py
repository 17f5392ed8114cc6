"""Restoring pictures with engines in 8 bits, and comparing them with those of float32."""
