"""Triton kernels, installed as ``paramdelta.kernels``: imported only by ``paramdelta.backends``, when asked for."""
