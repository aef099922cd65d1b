"""GLUE: fine-tuning BERT and RoBERTa checkpoints on its nine tasks."""
