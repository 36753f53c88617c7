"""Triton kernels: the same bits as every other backend, for GPUs whose toolkit was not there when this was built.

``codec`` decodes and encodes by integers, ``plain`` merges elements, ``blocks`` matrices of fp8 codes and scales,
``launch`` starts them on addresses. Nothing here is imported until a kernel is asked for: Triton is an extra.
"""
