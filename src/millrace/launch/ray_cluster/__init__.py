"""The launcher on a Ray cluster.

`launcher.py` is the adapter in the fleet's process. It imports no Ray: Ray ends a process that has lost its cluster for
a minute, and that must not be the trainer. `driver.py` is a child process, which speaks to Ray, and `actor.py` runs on
the host of each engine's node, where it starts the server below a guard.
"""
