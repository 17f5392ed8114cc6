"""The stages of a build, one file each: the inputs of a stage, and the work that fills its directory."""
