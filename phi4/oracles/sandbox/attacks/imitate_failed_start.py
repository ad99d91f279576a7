"""Output that imitates a sandbox that cannot start."""

import sys

sys.stderr.write("bwrap: Creating new namespace failed: Resource temporarily unavailable\n")
sys.stderr.write("setpriv: failed to execute bwrap: No such file or directory\n")
sys.exit(1)
