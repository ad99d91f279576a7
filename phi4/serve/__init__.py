"""An HTTP server for a model: the APIs of OpenAI and Ollama, and a chat page, over any
`Sampler`."""
