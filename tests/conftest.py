"""For every test, before any of them imports a kernel."""

import os

# Triton reads it where a kernel is decorated: the kernels then run in its interpreter, for which no GPU is needed.
os.environ["TRITON_INTERPRET"] = "1"
