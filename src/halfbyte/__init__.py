"""halfbyte: make a pretrained language model small, fast and yours, and measure what each step cost."""
from halfbyte.formats import FORMATS
from halfbyte.kernels import fake, quantize
