"""Published layouts and other forms of data: one file for each, all random access."""
