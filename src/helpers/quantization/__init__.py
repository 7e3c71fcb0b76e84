"""Calibration, smoothing, compression, and the checks on what was compressed."""
