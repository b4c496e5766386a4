"""The report of a run: html.py writes one HTML file; charts.py draws its curves.

parts.py has what other pages share: templates, images, percentages.
"""
