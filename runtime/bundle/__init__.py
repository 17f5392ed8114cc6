"""Reading, checking and writing the files of a bundle, with the standard library only."""
