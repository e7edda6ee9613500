"""The program that starts a sandbox; see `__main__.py`. Nothing of it is imported by the server."""
