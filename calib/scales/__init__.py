"""From statistics of numbers to the scales of 8-bit formats. Pure: no graphs, nothing is run."""
