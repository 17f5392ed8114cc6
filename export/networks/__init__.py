"""Networks that no library has, one file each."""
