"""Examples: scripts to run, read and fork."""
