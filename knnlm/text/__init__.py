"""From files to windows of tokens; knows no model."""
