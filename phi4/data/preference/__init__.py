"""Convert preference rows to token files of pairs or pivots."""
