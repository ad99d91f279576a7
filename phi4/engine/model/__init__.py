"""The model: megatron-core's GPT with our layers, and the micro-batches that it reads."""
