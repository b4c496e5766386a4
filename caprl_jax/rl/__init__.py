"""The CapRL algorithm: rollout, judge, reward, advantage and update, each a function of arrays.

Start at step.py, where one step calls all five. Nothing here imports the data or checkpoint
libraries, so each function can be embedded in other JAX programs.
"""
