"""What a data card says of a data set: its numbers, a page, and Croissant metadata."""
