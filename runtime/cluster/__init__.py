"""Devices on the machines of a Ray cluster. Between two calls all values are here, so none is lost with a machine."""
