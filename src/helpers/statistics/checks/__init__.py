"""Statistics and verdicts computed a second time, by other code."""
