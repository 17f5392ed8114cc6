"""Files from which a restoration that was stopped goes on: finished parts of an image, the results of a folder."""
