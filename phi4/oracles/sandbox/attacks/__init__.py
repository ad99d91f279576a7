"""Programs that attack the sandbox. They run inside it and are never imported."""
