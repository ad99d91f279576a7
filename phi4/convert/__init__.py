"""Conversion of weights to and from other systems' formats: Hugging Face's Phi3 directory."""

from phi4.convert.hf import read_hf, write_hf

__all__ = ["read_hf", "write_hf"]
