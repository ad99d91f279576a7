"""File formats: token shards and their manifests, and the inputs that documents are read from."""
