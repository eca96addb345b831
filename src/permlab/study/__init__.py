"""Many runs: grids, the runner of their jobs, tables, reports."""
