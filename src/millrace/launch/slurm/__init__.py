"""The launcher in a Slurm job: each node of an engine is a step of the job.

`launcher.py` is the adapter in the fleet's process. `driver.py` is a child process, which runs an `srun` for each step
(`step.py`). `agent.py` is what a step runs: it starts the server below a guard, on the step's node. `job.py` says what
the job has, and chooses the nodes.
"""
