"""Programs that measure, and what they measure against."""
