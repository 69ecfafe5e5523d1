"""The command `lordo`."""
