"""The OpenAPI document: descriptions of the routes, and what is built from them and the schemas that check requests."""
