"""Kernels for decoding one row and for the attention of a prompt on NVIDIA GPUs, and when they are used.

tuning       how the work is shared out: tiles, chunks, shares
device*      the code that runs on the GPU, in Triton
launch, calls    a function for each kernel: checks, allocates, launches
reference    the same functions as formulas
operators    the kernels as operators for torch.compile
rules        which formula of the model is replaced by what, and when
"""
