"""What the report draws: panels.py says which curves belong together, svg.py draws them as pictures
that need no script, and intervals.py says how sure an accuracy is."""
