"""Networks in, bundle out: tracing, weights by reference, graph rewrites, engines."""
