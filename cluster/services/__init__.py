"""What a run stands on: Redis, Ray and a judge's server, started and stopped by services.py.

placement.py and shared_storage.py ask Ray's nodes; orphans.py ends what a killed driver leaves;
allocator.py sets the workers' malloc; signals.py hears orders to stop; run_buffer.py opens a run's
buffer from outside. Read first: services.py.
"""
