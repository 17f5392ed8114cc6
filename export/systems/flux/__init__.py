"""The two systems on FLUX.1-Fill, and their shared parts."""
