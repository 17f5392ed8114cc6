"""TokSR: words lead a transformer over 32 tokens a tile."""
