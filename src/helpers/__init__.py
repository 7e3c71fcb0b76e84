"""What the notebooks call: one room for each kind of work, one field concept a module."""
