"""What the commands do. cli.py above declares them and imports from here when one runs.

train.py `train` and `evaluate`; runs.py `runs` and the end of every training; doctor.py, whose fast
checks are also the start of every training. Its checks doctor_inputs.py, doctor_machine.py,
doctor_network.py, doctor_plan.py and doctor_redis.py yield findings.py; buffer.py, data.py,
presets.py and scale.py are as the commands are called; configuration.py writes
docs/configuration.md.
"""
