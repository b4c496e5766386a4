"""Records, tasks and the pipeline that turns them into batches."""
