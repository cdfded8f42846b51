"""What a user sets: the recipe (what changes the result), the run (where and how fast), and how flags become both."""
