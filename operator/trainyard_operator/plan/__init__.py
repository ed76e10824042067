"""Decisions. Pure: no I/O, no clock, no randomness, no logging; imports only `trainyard_api`."""
