"""Calibration, smoothing, the choice of alpha, compression, INT8 products, variants."""
