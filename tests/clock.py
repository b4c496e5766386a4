"""The figures of a run that differ from one start to the next."""

CLOCK = {
    "time",
    "seconds_data",
    "seconds_step",
    "tokens_per_second",
    "generated_tokens_per_second",
    "wall_seconds",
    "host_rss_bytes",
    "open_files",
}
