"""What tables and figures share: the runs they read, and how their text is laid out."""
