"""A build: what is asked for, its stages, and running them."""
