"""For every test, before any of them imports a kernel."""

import os

# Triton reads it where a kernel is decorated: the kernels then run in its interpreter, for which no GPU is needed.
# TRITON_INTERPRET=0 in the environment leaves them to the compiler, as tests marked `gpu` need it.
os.environ.setdefault("TRITON_INTERPRET", "1")
