"""Constraints in other people's trainers; each module needs its trainer's package and is imported by its full name."""
