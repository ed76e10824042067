"""Talking to the API server: session, client, reflector, store, lease, Event recorder."""
