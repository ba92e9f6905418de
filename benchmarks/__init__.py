"""Measurements of ogpu.service, side by side with peers. See README.md; never part of the tests."""
