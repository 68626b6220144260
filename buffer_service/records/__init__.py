"""What the buffer stores and hands out: trajectories, requests and receipts, their binary form,
and what must hold before a byte is written.
"""
