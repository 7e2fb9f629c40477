"""The GPU side: Celery tasks, checks, attempts, training processes, model servers."""
