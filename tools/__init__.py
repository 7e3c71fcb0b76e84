"""Programs that make what is shipped; nothing of a study imports them."""
