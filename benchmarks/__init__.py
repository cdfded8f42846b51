"""``fastmae bench``: benchmarks, and what fastmae is compared with."""
