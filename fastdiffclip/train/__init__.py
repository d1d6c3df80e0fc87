"""The two training stages and the step that they share."""
