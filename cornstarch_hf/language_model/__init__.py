"""Features into the language model's embeddings, its call, and generation; knows configurations and tensors, no encoder."""
