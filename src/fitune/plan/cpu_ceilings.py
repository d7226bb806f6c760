"""What this machine's CPU does at most, measured in about a second and remembered."""
