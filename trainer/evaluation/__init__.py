"""What a student is worth: measured on its features, on those of a teacher, and on the clock."""
