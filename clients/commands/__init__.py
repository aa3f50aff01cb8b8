"""The commands, a file a group: options and a call. Each command imports what it needs, so that `--help` answers at once."""
