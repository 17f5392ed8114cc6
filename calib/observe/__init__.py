"""Looking at the numbers inside the networks of a bundle while it restores pictures."""
