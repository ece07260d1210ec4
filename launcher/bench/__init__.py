"""`pbsd bench NAME --json`: each bench measures in its own run and prints one JSON line."""
