"""Native multimodal checkpoints of transformers taken apart into compositions, and put together again, to the bit."""
