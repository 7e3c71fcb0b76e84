"""Intervals, paired tests, power, controls and verdicts. Imports no torch."""
