"""Items become prompts, predictions and scores."""
