"""Questions and rubrics for images: `curate generate | rubrics | paraphrase | filter | report`.

generate.py has a model write questions, which parse.py reads, or rubrics, for which rubrics.py has
request and parser; paraphrase.py makes rubrics of captions without a model; filter.py keeps those
that need the image, by the answers of local.py or an endpoint; report.py shows all. README.md says
what the files hold. Start at generate.generate.
"""
