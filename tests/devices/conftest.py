collect_ignore = ["pseudo.py", "pseudo_run.py"]
"""They take torch's place for another device, in a separate process."""
