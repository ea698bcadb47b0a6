"""Features into the language model's embeddings, the call of any causal language model, and generation.

Knows configurations and tensors; knows no encoder.
"""
