"""What a run stands on: Redis, Ray, a judge's server, shared storage, signals; started and stopped
by services.py.
"""
