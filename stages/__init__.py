"""What can stand in a chain; the TOML name is the path below here."""
