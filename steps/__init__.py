"""The steps of the reproduction: one file, one step, one command line (`python -m steps.<name>`)."""
