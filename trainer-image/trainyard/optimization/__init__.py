"""Optimizers and schedulers: what a module may configure, and who steps them."""
