"""What one replica does alone: fragments of parameters, the inner step, bases, copies. It never imports the sync."""
