"""InstantIR."""
