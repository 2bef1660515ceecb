"""Pipeline files: reading them, planning what runs and why, and running it."""
