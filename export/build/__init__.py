"""Building a bundle: the request, the stages, and running them."""
