"""From TOML to a frozen, checked `Config`, and back."""
