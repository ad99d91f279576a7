"""Open files that the builder of the sandbox left."""

import os

found = []
for fd in range(64):
    try:
        os.fstat(fd)
        found.append(str(fd))
    except OSError:
        pass
print(" ".join(found))
