"""Tokenizers: the exact vocabulary of Phi-4, byte-pair training, chat templates."""
