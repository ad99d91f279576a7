"""Checks that users can run on their own recipe and machine."""
