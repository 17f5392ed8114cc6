"""From networks to graphs: tracing, our ops as nodes, memory, rewrites."""
