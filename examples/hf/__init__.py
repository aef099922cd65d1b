"""Models in the folder format of Hugging Face's transformers, in Flax NNX."""
