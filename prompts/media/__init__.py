"""Clips, pictures and sound as arrays: opened by path, checked, decoded, cached. Start at
loader.py.
"""
