"""Building bundles from networks: tracing, weights by reference, graph rewrites, engines."""
