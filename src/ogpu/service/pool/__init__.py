"""The front's side of the workers: who runs what, until when, and what happens then."""
