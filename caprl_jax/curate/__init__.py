"""Questions and rubrics for images: `curate generate | rubrics | filter | report`.

generate.py has a model write questions, which parse.py reads, or rubrics, for which rubrics.py has
request and parser; filter.py keeps those that need the image, by the answers of local.py or an
endpoint; report.py shows both. README.md says what the files hold. Start at generate.generate.
"""
