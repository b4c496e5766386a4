"""Analysis of compiled programs from their text.

text.py parses it, loops.py counts trips, products.py counts an
instruction's operations and work.py its bytes, and costs.py sums them by
phase."""
