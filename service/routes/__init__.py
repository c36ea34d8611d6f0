"""The HTTP routes: each file reads as the life of one request, top to bottom.

May import everything of the service but `app` and `server`, which import it.
"""
