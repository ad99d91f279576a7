"""The sampling interface for any model: requests, samplers, and the text of ids."""
