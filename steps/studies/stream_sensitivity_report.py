"""What the order of models on the stream depends on."""
