"""LDAdam in the trainers that others wrote: one script each, see docs/frameworks.md."""
