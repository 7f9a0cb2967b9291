"""PyTorch's distributed checkpoint (DCP) on format 1: a StorageWriter and a StorageReader.

DCP plans who writes what and who reads what; here is how that gets to the disk and back.
"""
