"""Published numbers held to figures computed again from the answers."""
