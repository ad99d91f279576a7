"""A model behind HTTP: the APIs of OpenAI and Ollama, and a chat page, over any `Sampler`."""
