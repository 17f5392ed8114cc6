"""The stages of a build, one file each: what a stage depends on, and the work that fills its directory."""
