"""Clips, pictures and sound as arrays: opened by path, checked, decoded, cached. Start at
loader.py; decode.py reads video and sound, image.py pictures, completeness.py finds cut files.
"""
