"""From a prompt to text and masks."""
