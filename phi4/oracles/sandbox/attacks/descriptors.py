"""Open files inherited from the builder of the sandbox."""

import os

found = []
for fd in range(64):
    try:
        os.fstat(fd)
        found.append(str(fd))
    except OSError:
        pass
print(" ".join(found))
