"""The study file, its stages, and what a run of each depends on. Imports no torch."""
