"""The parts of `make gpu-check`, each run in a process of its own."""
