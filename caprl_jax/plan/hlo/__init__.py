"""Analysis of compiled programs from their text.

text.py parses it, loops.py counts trips, work.py prices instructions, and costs.py sums them by
phase."""
