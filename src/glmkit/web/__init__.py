"""The web app: chat, tools and code interpreter in one page."""
