"""What an answer's text means: content, reasoning and tool calls, as it streams."""
