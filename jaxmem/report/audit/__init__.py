"""The page that an audit ends in: its numbers, figures, pictures and sentences."""
