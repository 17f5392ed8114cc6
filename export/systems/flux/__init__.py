"""The two systems on FLUX.1-Fill, and what they share."""
