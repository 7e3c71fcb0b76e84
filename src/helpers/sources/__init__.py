"""Where models and items come from: the bundled ones, local files, the Hub, a fine-tuning."""
