"""What the tests share: a real server, a real callback receiver, and waiting with a bound."""
