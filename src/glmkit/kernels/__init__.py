"""Products with quantised weights in native code: compiled on first use, and never required.

levels.py says what the CPU can run, build.py compiles and tries it, trial.py is the trial, linear.py calls it.
"""
