"""Makes every Python process of a command believe in a GPU: PYTHONPATH=tests/gpu/site:tests/gpu bash bench/gpu.sh."""

import pretended_gpu

pretended_gpu.pretend(1)
