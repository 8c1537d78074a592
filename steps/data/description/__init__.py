"""What a file of one's own looks like, and the entry that reads it."""
