"""Writing, hashing and copying files so that a name never stands for half a file."""
