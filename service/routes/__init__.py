"""The HTTP routes: each file reads as the way of one request, and knows nothing of how the parts do their work."""
