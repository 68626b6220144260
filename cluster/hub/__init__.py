"""`avatar data fetch`: the public datasets of both papers, from a hub to rows that train.

datasets.py names them and their layouts, snapshot.py is one repository at one commit, download.py
brings its files here whole or not at all, archives.py unpacks them, rows.py writes our own rows,
fetch.py is the command. Read first: datasets.py.
"""
