"""The demo's data, built on this machine from its Python installation."""
