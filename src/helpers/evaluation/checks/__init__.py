"""Gates on an evaluation: items, prompts, answers, numerics."""
