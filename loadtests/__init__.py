"""Measurements of a running server from outside. Most modules have a command line; README.md says what each is for."""
