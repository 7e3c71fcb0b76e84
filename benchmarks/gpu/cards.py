"""What the data sheets of cards promise."""

# int8 operations a second without sparsity, by the name that torch gives a card.
INT8 = {"NVIDIA H100 80GB HBM3": 1.979e15, "NVIDIA H200": 1.979e15}
