"""Chat: messages, their token ids, tools, what models reply, and the methods that official scripts call."""
