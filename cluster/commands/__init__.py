"""The command line, one module to a command; cli.py above assembles them. Imports of a command are
made when it runs, so that `avatar --help` starts at once.
"""
