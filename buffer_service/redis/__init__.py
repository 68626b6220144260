"""How the buffer talks to Redis.

connection.py retries and types errors; wire.py is the short way of scripts and values. scripting.py
puts an operation of scripts/ behind the parts it requires. server.py is the embedded Redis. Nothing
outside buffer_service imports this but cluster/.
"""
