"""What every step needs: its command line, its files, its parameters, and where a result came from."""
