"""The front's HTTP side: it reads and answers requests, and calls no handler."""
