"""What a user subclasses."""
