"""python -m phi4_kernels.bench"""

import sys

from phi4_kernels.bench.command import main

sys.exit(main())
