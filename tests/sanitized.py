"""A pytest plugin (`-p tests.sanitized`): loads the C++ kernels from the file that HALFBYTE_SANITIZED names, in place
of those that are installed. `make sanitize` builds that file with AddressSanitizer."""

from __future__ import annotations

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("halfbyte.kernels._cpu", os.environ["HALFBYTE_SANITIZED"])
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
