"""A service that restores images over HTTP. Nothing else of the runtime imports it."""
