"""The study file, where things lie, and the record of what was run. Imports no torch."""
