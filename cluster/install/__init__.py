"""Is the installation whole? copies.py looks at each start whether there is one copy of us; the
others are steps of `make setup` that pip cannot do.
"""
