"""Text: from files to windows of tokens. Knows no model."""
