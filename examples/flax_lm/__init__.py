"""A Llama-style language model in Flax NNX, trained with LDAdam; see `train.py`."""
