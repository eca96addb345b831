"""These files are parts of a package that only `tests/repo/test_toy.py` puts together: nothing here is collected."""

collect_ignore_glob = ["*"]
