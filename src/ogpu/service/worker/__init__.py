"""What runs in the template and in the workers. Imports no web code and nothing from the front."""
