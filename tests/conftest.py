"""What every test process needs before torch is imported."""

import os

# vLLM on a CPU insists on one thread count in all threads, and OpenMP reads it once; runs set it per worker too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
