"""Triton kernels, installed as ``paramdelta.kernels``. Imported only by ``paramdelta.backends``, and only when asked for."""
