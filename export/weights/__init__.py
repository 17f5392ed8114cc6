"""The bytes of weights: where they lie in the user's files, and what is written here."""
