"""The report of engines in 8 bits: its facts, and a page that draws them."""
