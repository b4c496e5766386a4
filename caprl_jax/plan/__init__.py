"""Plans: a config's step, compiled ahead of time for devices that need not exist.

Start at plan.py. shapes.py makes the abstract arguments, roofline.py turns a program's work into
seconds, and hlo/ reads the compiled program.
"""
