"""Corpus filters: deduplication, decontamination, and removal of corrupted or foreign-language
text."""
