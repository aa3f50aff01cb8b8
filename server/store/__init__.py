"""What a server keeps: one database for presets, experiments and what was observed in them."""
