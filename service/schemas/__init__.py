"""What clients may send, and what they get: shapes and limits of single fields, no behaviour."""
