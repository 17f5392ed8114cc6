"""The command `tilewright`: one file a group of verbs."""
