"""Files: token shards and their manifests, and the formats that documents are read from."""
