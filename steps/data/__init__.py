"""Data from raw files to batches: sources, archives, readers, schemas, sequences."""
