"""`avatar view`: the runs of a folder as a local web page, static files, or text.

reading.py reads a run's files whatever state they are in, rollouts.py makes the table of saved
completions, clean.py leaves out what a foreign row has in another form. They give *resources*, JSON
documents with a name. server.py serves them on loopback behind guard.py; export.py writes the same
ones as files that open from disk; terminal.py prints. media.py finds the clips that samples name.
static/ is the page: plain scripts, no build step. Read first: resources.py.
"""
