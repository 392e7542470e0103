"""Data preparation: message trees or a user's own pairs are read, filtered, flattened into pairs, and reported on."""
