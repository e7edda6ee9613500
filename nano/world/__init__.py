"""The little world that glm-nano knows: its words, its facts and its grammar."""
