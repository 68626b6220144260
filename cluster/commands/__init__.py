"""What the commands do. cli.py above declares them and imports from here when one runs.

train.py `train` and `evaluate`; runs.py `runs` and the end of every training; doctor.py with its
checks doctor_machine.py and doctor_redis.py, which yield findings.py; buffer.py, data.py,
hint_generation.py and scale.py are as the commands are called; configuration.py writes
docs/configuration.md.
"""
