"""How the buffer talks to Redis: the connection, the atomic scripts (scripts/*.lua) and an
embedded server. Nothing outside this package imports it but cluster/.
"""
