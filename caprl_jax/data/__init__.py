"""Records, and the pipeline that turns them into batches.

sources/ has one file for each data source; digits/ is the embedded world of handwritten digits.
"""
