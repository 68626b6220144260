"""Ground floor: what every package uses, and what knows of none of them.

errors.py the typed errors; config.py the base of all config sections; types.py JSON; files.py files
written whole or not at all; process.py the process we are in; chat_client.py and endpoint_config.py
questions to a chat endpoint; scoring.py the records between rollout and reward actors.
"""
