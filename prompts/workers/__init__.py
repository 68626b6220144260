"""Processes that do a prompt's work (decoding, processing, towers) ahead of whoever needs it. Start
at pool.py; parcel.py says how large results come back.
"""
