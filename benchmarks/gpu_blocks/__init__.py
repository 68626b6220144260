"""Blocks of ``benchmarks.gpu``: each takes a device and sizes, so that what needs no GPU runs on a
CPU with tiny ones."""
