"""Tokenizers: Phi-4's exact vocabulary, byte-pair training, chat templates."""
