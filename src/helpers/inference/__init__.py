"""A model is read and answers: packed rows, greedy generation, log-likelihood, perplexity, vLLM."""
