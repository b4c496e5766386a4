"""Questions for a corpus of images: `python -m caprl_jax.curate generate | filter | report`.

generate.py has a model write multiple-choice questions, which parse.py reads; filter.py keeps those
that need the image, by the answers of local.py or remote.py; report.py shows both. README.md says
what the files hold. Start at generate.generate.
"""
