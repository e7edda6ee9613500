"""Products with quantised weights in native code: compiled on first use, and never required.

levels.py says what the CPU can run, build.py compiles it into the folder of cache.py, trial.py tries it in a process of
its own, linear.py calls it.
"""
