"""Quantized Hugging Face folders: bitsandbytes, GPTQ, AWQ, compressed-tensors and FP8.

Each has its own tensors for a weight. Here they become one tensor in the blocks of this package, with the same codes
and scales: nothing is quantized anew. Activations are not rounded, even where a config says that they are.
"""

from .config import read_quantization as read_quantization
