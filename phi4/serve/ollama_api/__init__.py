"""Ollama's API: generate, chat, tags, ps, version, show."""
