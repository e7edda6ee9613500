"""The code interpreter: a Jupyter kernel for each conversation, inside a sandbox whose strength is measured."""
