"""From TOML text to typed options to a wired chain to a plan."""
