"""The files of a bundle: reading, checking, writing. Standard library only."""
