"""Commands for people."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels at each import
