"""Stand-ins for parts that are too heavy for most tests."""
