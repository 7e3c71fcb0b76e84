"""Errors, paths, files, records, gates and processes; knows no study. Imports no torch."""
