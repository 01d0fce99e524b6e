"""The command line: `finetune`, one module a command, and what the commands share in `terminal`."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels at each import
