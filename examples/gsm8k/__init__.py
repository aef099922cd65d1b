"""Grade-school mathematics: full fine-tuning of a Llama with LDAdam; see `train.py`."""
