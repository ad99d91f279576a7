"""A call by the table of x32, which has other numbers for what the filter forbids."""

import ctypes

ctypes.CDLL(None).syscall(0x40000000 | 39)
print("let through")
