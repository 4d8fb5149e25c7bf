"""Kernels for NVIDIA GPUs, for decoding one row and for the attention of a prompt, and the rules that choose them.

tuning           how the work is divided: tiles, chunks, shares
device*          the code that runs on the GPU, in Triton
launch, calls    a function for each kernel: checks, allocates, launches
reference        the same functions as formulas
operators        the kernels as operators for torch.compile
rules            what compiled code computes in place of each formula of the model, and when
"""
