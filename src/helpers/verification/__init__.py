"""Gates on what was quantized: files, tensors, calibration, the loaded model."""
