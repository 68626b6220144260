"""Ground floor: what every package uses and knows nothing of them.

errors.py the typed errors; files.py whole files or none; heap.py and device.py the process we are
in; chat_client.py, circuit_breaker.py and endpoint_config.py questions to a chat endpoint.
"""
