"""The commands: each file turns arguments into a configuration and calls the library."""
