"""Asking a model for tokens, whichever model it is: requests, samplers, and the text of ids."""
