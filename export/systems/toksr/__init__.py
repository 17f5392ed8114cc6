"""TokSR: a transformer led by words restores 32 tokens of each tile."""
