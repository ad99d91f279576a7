"""Nothing, for long."""

import time

time.sleep(600)
