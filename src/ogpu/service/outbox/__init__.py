"""The delivery of callbacks, from the journal. Runs in the front; no worker waits for it."""
