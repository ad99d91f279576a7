"""Tokenization of documents into token shards, in parts that can resume."""
