"""The HTTPS endpoint that agents beat to: who they are, what they say, what they are to do."""
