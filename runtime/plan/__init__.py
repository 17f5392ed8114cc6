"""Planning a restoration: tiles, passes, schedules and noise. Nothing here runs an engine."""
