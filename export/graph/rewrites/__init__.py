"""Graph rewrites: one file, one function, one test each."""
