"""What runs where and when, as data: nothing here runs an engine."""
