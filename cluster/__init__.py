"""Starts, watches and restarts everything; the only package that knows all the others.

recipe/ a checked RunConfig from YAML; training/ one run and its loop; workers/ the Ray actors;
services/ Redis, Ray and what else runs beside; checkpoints/; telemetry/; curriculum/ runs in
series; commands/ the command line. Read first: training/loop.py.
"""
