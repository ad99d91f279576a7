"""Idle without end."""

import time

time.sleep(600)
