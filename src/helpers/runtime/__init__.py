"""Where and how a model computes: devices, float products, batches, positions."""
