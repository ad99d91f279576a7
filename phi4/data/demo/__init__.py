"""The demo corpus, built on this machine from what is installed on it."""
